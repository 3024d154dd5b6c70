"""The state of one run: cores, engines, contestants, and how a row is measured and kept."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Report, machine_lock
from tests.benchmarks.router.contestants import CONTESTANTS, HEADERS, Running, lineup
from tests.benchmarks.router.native import Engines, load
from tests.benchmarks.router.processes import Cores

ENGINES = 4
DIRECT = "direct"


@dataclass(frozen=True)
class Sample:
    """One measured load: the generator's figures and the contestant's CPU and memory."""

    figures: Mapping[str, Any]
    cpu_seconds: float
    rss_mib: float
    wall_seconds: float

    @property
    def answered(self) -> int:
        """Whole answers with status 200."""
        return int(self.figures["ok"])

    @property
    def failed(self) -> int:
        """Requests without one, those that the end of the run cut off aside."""
        return int(self.figures["finished"]) - self.answered

    @property
    def per_second(self) -> float:
        """Delivered requests a second."""
        return self.answered / float(self.figures["seconds"])

    @property
    def per_core(self) -> float:
        """Requests a second that one core of the contestant is good for."""
        return self.answered / self.cpu_seconds if self.cpu_seconds else 0.0

    @property
    def busy(self) -> float:
        """Share of its core that the contestant used."""
        return self.cpu_seconds / self.wall_seconds

    def ms(self, histogram: str, figure: str) -> float:
        """A figure of a histogram, in milliseconds."""
        return float(self.figures[f"{histogram}_ms"][figure])


@dataclass
class Bench:
    """One run."""

    report: Report
    directory: Path
    contestants: Sequence[str]
    quick: bool = False
    rounds: int = 3
    lock: Path | None = None
    cores: Cores = field(default_factory=Cores.choose)
    missing: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def engines(self, count: int = ENGINES, **settings: int | str) -> Iterator[Engines]:
        """Mock engines on their core."""
        with Engines(count, cpu=self.cores.engines, settings=settings) as engines:
            yield engines

    def chosen(self, *, slow: bool = True, only: Sequence[str] | None = None) -> list[str]:
        """The contestants of this run for a row."""
        names = [name for name in self.contestants if name in CONTESTANTS and name not in self.missing]
        if not slow:
            names = [name for name in names if not CONTESTANTS[name].slow]
        return [name for name in names if only is None or name in only]

    @contextlib.contextmanager
    def running(self, names: Sequence[str], engines: Engines) -> Iterator[list[Running]]:
        """Freshly started contestants on the measured core."""
        with (
            machine_lock(self.lock),
            lineup(names, engines.urls, self.directory, self.cores.proxy, self.missing) as started,
        ):
            yield started

    def sample(self, contestant: Running | None, port: int, requests: Path, **options: Any) -> Sample:
        """Run the generator once, and account the contestant's CPU over exactly that time."""
        before, begin = contestant.process.cpu_seconds() if contestant else 0.0, time.monotonic()
        figures = load(port, requests, cpu=self.cores.load, headers=HEADERS, **options)
        used = contestant.process.cpu_seconds() - before if contestant else 0.0
        rss = contestant.process.rss_mib() if contestant else 0.0
        return Sample(figures, used, rss, time.monotonic() - begin)

    def interleaved(
        self, names: Sequence[str], measure: Callable[[str], Sample], *, rounds: int | None = None
    ) -> dict[str, list[Sample]]:
        """Rounds over all contestants, so that a slow minute of the machine meets all of them."""
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        for _ in range(rounds or self.rounds):
            for name in names:
                samples[name].append(measure(name))
        return samples

    def title(self, name: str) -> str:
        """A contestant's name in the table."""
        return "engine, no router" if name == DIRECT else CONTESTANTS[name].title

    def row(self, row: str, name: str, **cells: str) -> None:
        """Add a line to the table; cells by column name."""
        self.report.rows.append((row, self.title(name), *(cells.get(c, "") for c in self.report.columns[2:])))

    def say(self, text: str) -> None:
        """Progress."""
        print(f"==> {time.monotonic() - self.began:5.0f} s  {text}", flush=True)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, with the range where it was measured more than once."""
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} [{min(values):,.{digits}f}..{max(values):,.{digits}f}]"
