"""The targets, as ratios between contestants of the same run."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.common import Check, Panel, Report
from tests.benchmarks.router.contestants import CONTESTANTS

RUST_RR = [name for name, c in CONTESTANTS.items() if c.kind == "rust-rr"]
RUST_CACHE = [name for name, c in CONTESTANTS.items() if c.kind == "rust-cache"]
RUST = RUST_RR + RUST_CACHE
# Runs of the same trace differ by about this much.
NOISE = 1.05


class _Figures:
    def __init__(self, report: Report) -> None:
        self._figures = report.figures

    def get(self, name: str) -> float | None:
        value = self._figures.get(name)
        return float(value) if isinstance(value, int | float) else None

    def best(self, pattern: str, names: Sequence[str], *, smallest: bool) -> tuple[float, str] | None:
        found = [(value, name) for name in names if (value := self.get(pattern.format(name))) is not None]
        return (min(found) if smallest else max(found)) if found else None

    def ratio(
        self, pattern: str, names: Sequence[str], *, smallest: bool = False
    ) -> tuple[float | None, str]:
        """Ours over the best of the others, and the words for it."""
        ours, best = self.get(pattern.format("ours")), self.best(pattern, names, smallest=smallest)
        if ours is None or best is None or not best[0]:
            return None, ""
        return ours / best[0], f"{ours:,.4g} against {best[0]:,.4g} ({best[1]})"


def judge(report: Report) -> None:
    """Add every target that this run can answer, and say which it can't."""
    figures = _Figures(report)

    def ratio(
        name: str,
        pattern: str,
        names: Sequence[str],
        target: float,
        *,
        at_most: bool = False,
        smallest: bool = False,
    ) -> None:
        value, detail = figures.ratio(pattern, names, smallest=smallest)
        report.checks.append(Check(name, value, target, at_most=at_most, unit="x", detail=detail))

    core = "requests.{}.c32.{{}}.req_per_core"
    ratio("req/s/core 2 KB, of the better cache-aware", core.format("2KB"), RUST_CACHE, 2.5)
    ratio("req/s/core 2 KB, of the better round robin", core.format("2KB"), RUST_RR, 1.5)
    ratio("req/s/core 32 KB, of the better round robin", core.format("32KB"), RUST_RR, 2.0)
    ratio("req/s/core 2 KB, of HAProxy", core.format("2KB"), ["haproxy"], 0.5)
    ratio("req/s/core 32 KB, of HAProxy", core.format("32KB"), ["haproxy"], 1.0)
    for streams in (64, 300, 1000):
        pattern = f"streams.{streams}.{{}}.us_per_chunk"
        ratio(f"µs per chunk at {streams} streams", pattern, RUST, 0.7, at_most=True, smallest=True)
    for streams in (300, 1000):
        pattern = f"streams.{streams}.{{}}.chunk_delay_p99_ms"
        ratio(f"chunk delay p99 at {streams} streams", pattern, RUST, 1.0, at_most=True, smallest=True)
    pattern = "requests.2KB.c1.{}.added_p50_ms"
    ratio("added p50 at one connection, 2 KB", pattern, RUST, 1.0, at_most=True, smallest=True)
    absolute = (
        ("disconnect to upstream close", "disconnect.ours.upstream_close_max_ms", 10.0, "ms"),
        ("slow reader: RSS growth", "slow_reader.ours.rss_growth_mib", 5.0, "MB"),
        ("table of 10,000 endpoints: longest pause", "table_update.longest_pause_ms", 50.0, "ms"),
    )
    for name, figure, target, unit in absolute:
        report.checks.append(Check(name, figures.get(figure), target, at_most=True, unit=unit))
    for key, title in (("prefix", "prefix trace"), ("multi_turn", "multi-turn trace")):
        ratio(f"{title}: hit rate", f"{key}.{{}}.hit_rate", RUST_CACHE, 1.0)
        pattern = f"{key}.{{}}.ttft_p99_ms"
        ratio(f"{title}: TTFT p99", pattern, RUST_CACHE, 1.0, at_most=True, smallest=True)
    pattern = "unshared.{}.ttft_p99_ms"
    ratio("nothing shared: TTFT p99, of affinity None", pattern, ["ours-none"], NOISE, at_most=True)


def panels(report: Report) -> None:
    """What the plot shows."""
    figures = _Figures(report)
    wanted = (
        ("2 KB bodies", "req/s per core, 32 connections", "requests.2KB.c32.{}.req_per_core", False),
        ("32 KB bodies", "req/s per core, 32 connections", "requests.32KB.c32.{}.req_per_core", False),
        ("220 KB bodies", "req/s per core, 32 connections", "requests.220KB.c32.{}.req_per_core", False),
        ("CPU for a streamed chunk", "µs, 300 streams", "streams.300.{}.us_per_chunk", False),
        ("Chunk delay p99", "ms, 300 streams", "streams.300.{}.chunk_delay_p99_ms", True),
        ("Chunk delay p99", "ms, 1,000 streams", "streams.1000.{}.chunk_delay_p99_ms", True),
        ("Client leaves: upstream closed after", "ms", "disconnect.{}.upstream_close_ms", True),
        ("Prefix trace, TTFT p99", "ms", "prefix.{}.ttft_p99_ms", True),
        ("Slow reader, memory growth", "MB", "slow_reader.{}.rss_growth_mib", False),
    )
    for title, unit, pattern, log in wanted:
        found = {name: figures.get(pattern.format(name)) for name in CONTESTANTS}
        values = {name: value for name, value in found.items() if value is not None}
        if values:
            report.panels.append(Panel(title, unit, values, log))
