"""What every benchmark shares: one report with a table, flat figures in JSON, and a plot."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import statistics
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "build" / "bench"


@dataclass(frozen=True)
class Check:
    """One target: a measured value and the bound it must keep."""

    name: str
    value: float | None
    """``None``: not measured in this run."""
    target: float
    at_most: bool = False
    """Whether the bound is the largest allowed value, and not the smallest."""
    unit: str = ""
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` when it wasn't measured."""
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass
class Panel:
    """One bar chart of the plot: a value a contestant."""

    title: str
    unit: str
    values: Mapping[str, float]
    log: bool = False


@dataclass
class Report:
    """Figures of one benchmark. ``figures`` is flat: one number or text a name."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    figures: dict[str, float | int | str | bool | None] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: float | str | bool | None) -> None:
        """Keep one figure."""
        self.figures[name] = round(value, 6) if isinstance(value, float) else value

    def put_series(self, name: str, values: Sequence[float]) -> float:
        """Keep median, smallest and largest of repeated measurements; returns the median."""
        median = statistics.median(values)
        self.put(name, median)
        if len(values) > 1:
            self.put(f"{name}.min", min(values))
            self.put(f"{name}.max", max(values))
        return median

    def write(self, directory: Path = OUTPUT) -> Path:
        """Write ``NAME.json`` (and ``NAME.svg`` where there is something to draw)."""
        directory.mkdir(parents=True, exist_ok=True)
        for check in self.checks:
            key = "check." + check.name
            self.put(key, check.value)
            self.put(key + ".target", ("<= " if check.at_most else ">= ") + f"{check.target:g}")
            self.put(key + ".met", check.met)
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps({**machine(), **self.figures}, indent=1) + "\n")
        if self.panels:
            draw(self.panels, directory / f"{self.name}.svg", self.title)
        return path

    def print(self, console: Console | None = None) -> None:
        """The one table, then the targets."""
        console = console or Console()
        used = [index for index in range(len(self.columns)) if any(row[index] for row in self.rows)]
        table = Table(title=self.title, title_justify="left", header_style="bold", padding=(0, 1, 0, 0))
        for index in used:
            table.add_column(self.columns[index], justify="left" if index < 2 else "right", no_wrap=True)
        if not console.is_terminal:  # a file or a pipe has no edge to wrap at
            console.width = 240
        last = ""
        for row in self.rows:
            cells = ["" if index == 0 and row[0] == last else row[index] for index in used]
            table.add_row(*cells, end_section=False)
            last = row[0]
        console.print(table)
        if self.checks:
            console.print(self._check_table())
        for note in self.notes:
            console.print(note, highlight=False)

    def _check_table(self) -> Table:
        table = Table(title="Targets", title_justify="left", header_style="bold")
        for column in ("target", "bound", "measured", "", "from"):
            table.add_column(column, justify="right" if column in {"bound", "measured"} else "left")
        words = {True: "[green]met[/]", False: "[red]MISSED[/]", None: "not measured"}
        for check in self.checks:
            bound = ("≤ " if check.at_most else "≥ ") + f"{check.target:g} {check.unit}".rstrip()
            value = "-" if check.value is None else f"{check.value:.3g}"
            table.add_row(check.name, bound, value, words[check.met], check.detail)
        return table


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "machine.cpu": model or platform.processor(),
        "machine.cores": len(os.sched_getaffinity(0)),
        "machine.kernel": platform.release(),
        "machine.python": platform.python_version(),
        # An interpreter built without profile-guided optimization is a fifth to a third slower.
        "machine.python_optimized": "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")),
    }


def draw(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Bar charts beside one another, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.2 * rows), squeeze=False)
    figure.suptitle(title)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        names = list(panel.values)
        colours = ["#1f6feb" if name.startswith("ours") else "#9aa4af" for name in names]
        bars = axis.barh(names, list(panel.values.values()), color=colours)
        axis.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.unit, fontsize=8)
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
        if panel.log and min(panel.values.values(), default=0) > 0:
            axis.set_xscale("log")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


@contextlib.contextmanager
def machine_lock(path: Path | None) -> Iterator[None]:
    """Hold a lock file while something is measured, so that other heavy work on the machine can wait.

    It blocks in the kernel: whoever asked first gets it first.
    """
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
