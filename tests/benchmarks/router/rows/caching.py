"""Rows 4: traces on simulated engines with a prefix cache.

The engines are the mock's simulated ones and not the Python simulator: eight of them share a core with the
generator, and a Python engine would be the bottleneck there. The model is the same: one prefill at a time at
a fixed token rate less what an LRU cache of 16-token blocks holds, decoding that slows with the batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from tests.benchmarks.router import workload
from tests.benchmarks.router.bench import Bench, Sample
from tests.benchmarks.router.native import Engines
from tests.benchmarks.router.workload import Trace

REPLICAS = 8
# An 8B model on a 24 to 48 GB card: 20,000 prompt tokens a second, 262,144 tokens of KV cache.
ENGINE = {
    "sim": 1, "sim_rate": 20_000, "sim_blocks": 16_384, "sim_itl_us": 15_000, "sim_slope_us": 100,
    "sim_running": 256, "sim_overhead_us": 3_000,
}  # fmt: skip
CONTESTANTS = ("ours", "ours-none", "vllm-rr", "vllm-cache", "sglang-rr", "sglang-cache", "haproxy")


def measure(bench: Bench) -> None:
    """Shared prefixes, conversations, and nothing shared."""
    stage = 4.0 if bench.quick else 10.0
    folder = bench.directory
    traces: dict[str, Callable[[int], Trace]] = {
        "prefix": lambda n: workload.shared_prefix(folder / "prefix", stage_seconds=stage, seed=7 + n),
        "multi_turn": lambda n: workload.multi_turn(
            folder / "turns", sessions=100 if bench.quick else 300, seconds=2 * stage, seed=11 + n
        ),
        "unshared": lambda n: workload.unshared(folder / "unshared", rate=26, seconds=3 * stage, seed=13 + n),
    }
    rounds = 1 if bench.quick else min(2, bench.rounds)
    with bench.engines(REPLICAS, **ENGINE) as engines:
        for key, make in traces.items():
            taken: dict[str, list[tuple[Sample, float]]] = {}
            trace = None
            for number in range(rounds):
                trace = make(number)
                bench.say(f"{key}: {trace.requests} requests, round {number + 1}")
                for name in bench.chosen(slow=False, only=CONTESTANTS):
                    bench.say(f"{key}: {name}")
                    sample = _play(bench, name, engines, trace)
                    if sample is not None:
                        taken.setdefault(name, []).append(sample)
            if trace is not None:
                _keep(bench, key, trace, taken)


def _play(bench: Bench, name: str, engines: Engines, trace: Trace) -> tuple[Sample, float] | None:
    """One trace against a fresh router and cold caches."""
    with bench.running([name], engines) as started:
        if not started:
            return None
        engines.reset()
        router = started[0]
        sample = bench.sample(
            router,
            router.port,
            trace.path,
            mode="trace",
            connections=2000,
            duration=trace.seconds + 60,
            timeout=120,
        )
        return sample, engines.total("cached_tokens") / max(1, engines.total("prompt_tokens"))


def _keep(bench: Bench, key: str, trace: Trace, taken: dict[str, list[tuple[Sample, float]]]) -> None:
    titles = {
        "prefix": "150 groups x 5, 6,000 + 1,200 tokens",
        "multi_turn": "conversations of 6 turns",
        "unshared": "nothing shared",
    }
    bench.report.put(f"{key}.requests", trace.requests)
    bench.report.put(f"{key}.best_hit_rate", trace.best_hit_rate)
    for name, pairs in taken.items():
        samples = [sample for sample, _ in pairs]
        figures = f"{key}.{name}"
        bench.report.put_series(f"{figures}.hit_rate", [hit for _, hit in pairs])
        for figure in ("p50", "p99", "mean"):
            bench.report.put_series(f"{figures}.ttft_{figure}_ms", [s.ms("ttft", figure) for s in samples])
        failed = sum(s.failed + int(s.figures["unfinished"]) for s in samples)
        bench.report.put(f"{figures}.failed", failed)
        cells = {
            "hit rate": f"{100 * statistics.median(hit for _, hit in pairs):.1f} %",
            "p50 ms": f"{statistics.median(s.ms('ttft', 'p50') for s in samples):,.1f}",
            "p99 ms": f"{statistics.median(s.ms('ttft', 'p99') for s in samples):,.1f}",
            "failed": str(failed or ""),
            "note": "TTFT",
        }
        bench.row(titles[key], name, **cells)
