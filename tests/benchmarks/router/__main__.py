"""``python -m tests.benchmarks.router``: the router against its peers, on one core each, in one run."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from tests.benchmarks.common import OUTPUT, Report
from tests.benchmarks.router import peers, verdict
from tests.benchmarks.router.bench import Bench
from tests.benchmarks.router.contestants import CONTESTANTS
from tests.benchmarks.router.rows import caching, clients, requests, streaming

ROWS: dict[str, Callable[[Bench], None]] = {
    "requests": requests.measure,
    "streams": streaming.measure,
    "disconnect": clients.disconnects,
    "slow-reader": clients.slow_reader,
    "table": clients.table_update,
    "caching": caching.measure,
}
COLUMNS = (
    "row", "contestant", "req/s", "req/s/core", "p50 ms", "p99 ms", "µs/chunk", "chunk delay p99 ms",
    "close ms", "hit rate", "RSS MB", "failed", "note",
)  # fmt: skip


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _names(text: str, known: list[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def main(
    rows: Annotated[str, typer.Option(help=f"Comma-separated, of {_list(ROWS)}; default all.")] = "",
    contestants: Annotated[
        str, typer.Option(help=f"Comma-separated, of {_list(CONTESTANTS)}; default all.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; figures are medians.")] = 3,
    quick: Annotated[bool, typer.Option(help="A few minutes: shorter, one round, fewer points.")] = False,
    output: Annotated[Path, typer.Option(help="Where router.json and router.svg go.")] = OUTPUT,
    lock: Annotated[
        Path | None, typer.Option(help="File to lock while measuring, so that other heavy work can wait.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 1 when a target is missed.")] = False,
) -> None:
    """Measure the router and its peers; print one table; write router.json and router.svg."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # contestants and engines end with us
    report = Report("router", "Router: one pinned core each, same generator, same engines", COLUMNS)
    with tempfile.TemporaryDirectory(prefix="modelfleet-bench-") as folder:
        bench = Bench(
            report,
            Path(folder),
            _names(contestants, list(CONTESTANTS), "contestants"),
            quick=quick,
            rounds=1 if quick else rounds,
            lock=lock,
        )
        for row in _names(rows, list(ROWS), "rows"):
            ROWS[row](bench)
    verdict.judge(report)
    verdict.panels(report)
    report.put("rounds", bench.rounds)
    report.put("quick", quick)
    report.put("ours.python", str(peers.our_python()))
    for name, why in bench.missing.items():
        report.put(f"missing.{name}", why)
        report.notes.append(f"{name} did not run: {why.splitlines()[-1] if why else ''}")
    path = report.write(output)
    report.print()
    print(f"Figures: {path}, plot: {path.with_suffix('.svg')}")
    if strict and any(check.met is False for check in report.checks):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
