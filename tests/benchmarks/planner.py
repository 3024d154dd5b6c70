"""CPU time of planning many variants over many accelerator groups: ``python -m tests.benchmarks.planner``.

Every real checkpoint shape that the planner's tests know, in turn, over all accelerators of the catalogue and
groups of unknown kinds besides. The best of several rounds counts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from tests.benchmarks.common import Check, Report
from tests.unit.planner.measured import all_configs

from modelfleet_operator.catalog.accelerators import accelerators
from modelfleet_operator.planner import (
    AcceleratorGroup,
    NodeCapacity,
    PlanResult,
    PoolView,
    VariantRequest,
    plan_all,
)
from modelfleet_operator.planner.quantization import checkpoint_names
from modelfleet_serving.contract import EngineSettings

LIMIT_SECONDS = 2.0


def pool_of(groups: int) -> PoolView:
    """`groups` groups of 20 nodes with 8 accelerators; beyond the catalogue's kinds unknown ones."""
    kinds = [name for name, kind in accelerators().items() if not kind.is_cpu][:groups]
    names = [*kinds, *(f"other-{number}" for number in range(groups - len(kinds)))]
    return PoolView(tuple(AcceleratorGroup(name, (NodeCapacity((1.0,) * 8, count=20),)) for name in names))


def requests_of(variants: int) -> dict[str, VariantRequest]:
    """`variants` variants, by name, no two of one source."""
    shapes = [config.facts for config in all_configs()]
    requests = {}
    for number in range(variants):
        facts = shapes[number % len(shapes)]
        engine = EngineSettings(type="vLLM", max_model_len=2048 if number % 2 else None)
        quantization = min(checkpoint_names(facts.quantization))
        requests[str(number)] = VariantRequest(replace(facts, source=str(number)), quantization, engine)
    return requests


def _timed(requests: dict[str, VariantRequest], pool: PoolView) -> tuple[float, dict[str, PlanResult]]:
    begin = time.process_time()
    results = plan_all(requests, pool)
    return time.process_time() - begin, results


def main() -> None:
    """Measure, print, write ``build/bench/planner.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    report = Report(
        "planner", "Planning on one core", ("variants", "groups", "seconds", "placed", "us a variant")
    )
    best = 0.0
    for variants, groups in ((100, 5), (1000, 5), (1000, 50)):
        requests, pool = requests_of(variants), pool_of(groups)
        taken = [_timed(requests, pool) for _ in range(rounds)]
        best = min(seconds for seconds, _ in taken)
        placed = sum(result.fits for result in taken[0][1].values())
        name = f"{variants}x{groups}"
        report.put(f"{name}.cpu_seconds", best)
        report.put(f"{name}.placed", placed)
        report.rows.append(
            (str(variants), str(groups), f"{best:.3f}", str(placed), f"{best / variants * 1e6:.0f}")
        )
    report.checks.append(
        Check("1,000 variants over 50 groups", best, LIMIT_SECONDS, at_most=True, unit="s of CPU")
    )
    report.print()
    print(report.write())


if __name__ == "__main__":
    main()
