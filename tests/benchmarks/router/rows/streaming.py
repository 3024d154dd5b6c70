"""Rows 2: many streams at 20 ms a token."""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.benchmarks.router import workload
from tests.benchmarks.router.bench import DIRECT, Bench, Sample, spread
from tests.benchmarks.router.native import Engines

STREAMS = (64, 300, 1000)
TOKENS = 250


def measure(bench: Bench) -> None:
    """CPU for a chunk, and how late it arrives."""
    requests = workload.streams(bench.directory / "streams", tokens=TOKENS)
    with bench.engines(interval_us=20_000) as engines:
        for count in STREAMS[:2] if bench.quick else STREAMS:
            _streams(bench, engines, count, requests)


def _streams(bench: Bench, engines: Engines, count: int, requests: Path) -> None:
    with bench.running(bench.chosen(slow=count == STREAMS[0]), engines) as started:
        routers = {router.name: router for router in started}
        bench.say(f"{count} streams: {', '.join(routers)}")
        options = {"connections": count, "duration": 3.5 if bench.quick else 7.0, "ramp": 1.0, "warmup": 1.5}

        def once(name: str) -> Sample:
            router = routers.get(name)
            return bench.sample(router, router.port if router else engines.ports[0], requests, **options)

        _keep(bench, count, bench.interleaved([DIRECT, *routers], once, rounds=min(bench.rounds, 2)))


def _keep(bench: Bench, count: int, samples: dict[str, list[Sample]]) -> None:
    for name, taken in samples.items():
        figures = f"streams.{count}.{name}"
        put = bench.report.put_series
        chunks = [int(s.figures["chunks"]) for s in taken]
        put(f"{figures}.chunk_delay_p50_ms", [s.ms("chunk_delay", "p50") for s in taken])
        put(f"{figures}.chunk_delay_p99_ms", [s.ms("chunk_delay", "p99") for s in taken])
        rates = [c / float(s.figures["seconds"]) for c, s in zip(chunks, taken, strict=True)]
        put(f"{figures}.chunks_per_s", rates)
        failed = sum(s.failed for s in taken)
        bench.report.put(f"{figures}.failed", failed)
        cells = {
            "chunk delay p99 ms": spread([s.ms("chunk_delay", "p99") for s in taken], 2),
            "p50 ms": f"{statistics.median(s.ms('chunk_delay', 'p50') for s in taken):.3f}",
            "failed": str(failed or ""),
        }
        if name != DIRECT:
            cost = [1e6 * s.cpu_seconds / max(1, c) for s, c in zip(taken, chunks, strict=True)]
            put(f"{figures}.us_per_chunk", cost)
            bench.report.put(f"{figures}.rss_mib", max(s.rss_mib for s in taken))
            bench.report.put(f"{figures}.core_busy", statistics.median(s.busy for s in taken))
            cells |= {"µs/chunk": spread(cost, 1), "RSS MB": f"{max(s.rss_mib for s in taken):,.0f}"}
        bench.row(f"{count} streams", name, **cells)
