"""Rows 1: requests of three sizes at three numbers of connections."""

from __future__ import annotations

import contextlib
import statistics

from tests.benchmarks.router import workload
from tests.benchmarks.router.bench import DIRECT, Bench, Sample, spread

SIZES = {"2KB": 2_000, "32KB": 32_000, "220KB": 220_000}
CONNECTIONS = (1, 32, 256)
SLOW_LIMITS = {("2KB", 1), ("2KB", 32), ("32KB", 32)}


def measure(bench: Bench) -> None:
    """Requests a second and core, added latency, memory."""
    with bench.engines() as engines:
        for size, length in SIZES.items():
            if bench.quick and size == "220KB":
                continue
            requests = workload.bodies(bench.directory / f"bodies-{size}", length)
            with bench.running(bench.chosen(), engines) as started:
                routers = {router.name: router for router in started}
                for connections in CONNECTIONS:
                    names = [DIRECT] + [
                        name
                        for name in routers
                        if (size, connections) in SLOW_LIMITS or name != "litellm"
                    ]
                    bench.say(f"{size} bodies, {connections} connections: {', '.join(names)}")

                    def once(name: str, connections: int = connections) -> Sample:
                        router = routers.get(name)
                        port = router.port if router else engines.ports[0]
                        duration = 1.0 if bench.quick else 2.5
                        return bench.sample(router, port, requests, connections=connections, duration=duration)

                    with contextlib.suppress(KeyError):
                        for name in names:
                            bench.sample(
                                routers.get(name), routers[name].port if name in routers else engines.ports[0],
                                requests, connections=connections, duration=0.3,
                            )  # fmt: skip
                    _keep(bench, f"{size}.c{connections}", bench.interleaved(names, once))


def _keep(bench: Bench, key: str, samples: dict[str, list[Sample]]) -> None:
    base = {figure: statistics.median(s.ms("latency", figure) for s in samples[DIRECT]) for figure in ("p50", "p99")}
    size, connections = key.split(".c")
    for name, taken in samples.items():
        figures = f"requests.{key}.{name}"
        put = bench.report.put_series
        put(f"{figures}.req_per_s", [s.per_second for s in taken])
        put(f"{figures}.p50_ms", [s.ms("latency", "p50") for s in taken])
        put(f"{figures}.p99_ms", [s.ms("latency", "p99") for s in taken])
        failed = sum(s.failed for s in taken)
        bench.report.put(f"{figures}.failed", failed)
        cells = {"req/s": f"{statistics.median(s.per_second for s in taken):,.0f}", "failed": str(failed or "")}
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
