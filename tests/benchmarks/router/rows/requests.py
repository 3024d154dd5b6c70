"""Rows 1: requests of three sizes at three numbers of connections."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

from tests.benchmarks.router import workload
from tests.benchmarks.router.bench import DIRECT, Bench, Sample, spread
from tests.benchmarks.router.contestants import CONTESTANTS
from tests.benchmarks.router.native import Engines

SIZES = {"2KB": 2_000, "32KB": 32_000, "220KB": 220_000}
CONNECTIONS = (1, 32, 256)
SLOW_LIMITS = {("2KB", 1), ("2KB", 32), ("32KB", 32)}


def measure(bench: Bench) -> None:
    """Requests a second and core, added latency, memory."""
    with bench.engines() as engines:
        for size, length in SIZES.items():
            if not (bench.quick and size == "220KB"):
                _size(bench, engines, size, workload.bodies(bench.directory / f"bodies-{size}", length))


def _size(bench: Bench, engines: Engines, size: str, requests: Path) -> None:
    with bench.running(bench.chosen(), engines) as started:
        routers = {router.name: router for router in started}

        def once(name: str, connections: int, duration: float) -> Sample:
            router = routers.get(name)
            port = router.port if router else engines.ports[0]
            return bench.sample(router, port, requests, connections=connections, duration=duration)

        for connections in CONNECTIONS:
            slow = (size, connections) in SLOW_LIMITS
            names = [DIRECT, *(name for name in routers if slow or not CONTESTANTS[name].slow)]
            bench.say(f"{size} bodies, {connections} connections: {', '.join(names)}")
            for name in names:  # connections and caches are made before anything counts
                once(name, connections, 0.3)
            duration = 1.0 if bench.quick else 2.5
            measured = partial(once, connections=connections, duration=duration)
            _keep(bench, f"{size}.c{connections}", bench.interleaved(names, measured))


def _keep(bench: Bench, key: str, samples: dict[str, list[Sample]]) -> None:
    direct = samples[DIRECT]
    base = {f: statistics.median(s.ms("latency", f) for s in direct) for f in ("p50", "p99")}
    size, connections = key.split(".c")
    for name, taken in samples.items():
        figures = f"requests.{key}.{name}"
        put = bench.report.put_series
        put(f"{figures}.req_per_s", [s.per_second for s in taken])
        put(f"{figures}.p50_ms", [s.ms("latency", "p50") for s in taken])
        put(f"{figures}.p99_ms", [s.ms("latency", "p99") for s in taken])
        failed = sum(s.failed for s in taken)
        bench.report.put(f"{figures}.failed", failed)
        delivered = statistics.median(s.per_second for s in taken)
        cells = {"req/s": f"{delivered:,.0f}", "failed": str(failed or "")}
        if name == DIRECT:
            cells["p50 ms"] = f"{base['p50']:.3f}"
            cells["p99 ms"] = f"{base['p99']:.3f}"
        else:
            put(f"{figures}.req_per_core", [s.per_core for s in taken])
            put(f"{figures}.cpu_us_per_request", [1e6 * s.cpu_seconds / max(1, s.answered) for s in taken])
            added = {f: [s.ms("latency", f) - base[f] for s in taken] for f in base}
            put(f"{figures}.added_p50_ms", added["p50"])
            put(f"{figures}.added_p99_ms", added["p99"])
            bench.report.put(f"{figures}.rss_mib", max(s.rss_mib for s in taken))
            bench.report.put(f"{figures}.core_busy", statistics.median(s.busy for s in taken))
            cells |= {
                "req/s/core": spread([s.per_core for s in taken]),
                "p50 ms": f"+{statistics.median(added['p50']):.3f}",
                "p99 ms": f"+{statistics.median(added['p99']):.3f}",
                "RSS MB": f"{max(s.rss_mib for s in taken):,.0f}",
            }
        bench.row(f"{size}, {connections} conn.", name, **cells)
