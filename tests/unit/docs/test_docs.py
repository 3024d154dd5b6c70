"""What README and docs/ point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
import yaml

from modelfleet_operator.cli import app

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "charts" / "modelfleet" / "README.md", *(ROOT / "docs").glob("*.md")]
)
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_commands_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    for line in code:
        for name in re.findall(r"(?:^|/|\| )modelfleet ([a-z]+)", line):
            assert name in COMMANDS, line
        for name in re.findall(r"^(?:[A-Z_]+=\S+ )?make ([a-z-]+)", line):
            assert name in TARGETS, line


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"(?:^|[\s`])((?:manifests|charts|tests|scripts|docs|docker)/[\w./-]+)", page.read_text()
    )
    for name in (n.rstrip(".,:)") for n in named):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"docs/(\w+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_table_of_accelerators_is_the_catalogue() -> None:
    catalogue = yaml.safe_load(
        (ROOT / "operator" / "modelfleet_operator" / "catalog" / "accelerators.yaml").read_text()
    )
    listed = {
        a["name"]: (str(a["memoryGiB"]), a.get("computeCapability", "-")) for a in catalogue["accelerators"]
    }
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([\d.]+|the node's) \| ([\d.]+|-) \|",
        (ROOT / "docs" / "accelerators.md").read_text(),
        re.MULTILINE,
    )
    told = {
        name: ("0" if memory == "the node's" else memory, capability) for name, memory, capability in rows
    }
    assert told == {n: (m.removesuffix(".0"), c) for n, (m, c) in listed.items()}
