"""The README's commands, as its reader types them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.chart.rendered import ROOT

README = ROOT / "README.md"
SECTION = "## On Kubernetes"


@dataclass(frozen=True)
class Command:
    """A command of a ``console`` block and what the README says that it prints; nothing if it doesn't say."""

    text: str
    expected: str


def section() -> str:
    """The cluster section."""
    return README.read_text().partition(f"\n{SECTION}\n")[2].partition("\n## ")[0]


def reasons() -> set[str]:
    """What its table of errors names as reasons of ours."""
    rows = re.findall(r"^\| `([A-Z][A-Za-z]+)` as ", section(), re.MULTILINE)
    return set(rows)


def commands() -> list[Command]:
    """Every command of the cluster section, in order."""
    found: list[Command] = []
    for block in re.findall(r"^```console\n(.*?)^```", section(), re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            text, lines = "", part.splitlines()
            while lines:
                text += lines.pop(0)
                if not text.endswith("\\"):
                    break
                text = f"{text[:-1].rstrip()} " + (lines.pop(0).strip() if lines else "")
                if text.endswith("\\"):
                    continue
                break
            found.append(Command(text, "\n".join(lines)))
    return found


def matches(command: Command, printed: str) -> bool:
    """Whether it printed what the README says, apart from ages and the width of columns."""

    def normal(text: str) -> list[list[str]]:
        words = [line.split() for line in text.splitlines()]
        return [[re.sub(r"^(\d+[smh])+$", "AGE", word) for word in line] for line in words]

    shown = [line for line in normal(command.expected) if line]
    return not shown or [line for line in normal(printed) if line][-len(shown) :] == shown
