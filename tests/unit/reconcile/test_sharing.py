"""Two small variants on the only GPU: planned together, and from then on left alone."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.planner.measured import config, pool
from tests.unit.reconcile.world import World, deployment, step

from modelfleet_operator.api import ModelDeployment, parse_object
from modelfleet_operator.reconcile.planning import PoolPlanner

SMALL = config("Qwen/Qwen2.5-0.5B-Instruct").facts
KEY = "default/m"
ON_A10 = [{"type": "A10"}]
BOTH = [{"name": "a", "accelerators": ON_A10}, {"name": "b", "accelerators": ON_A10}]


class Machine:
    """A machine with one A10, and what the operator makes of a ModelDeployment there."""

    def __init__(self) -> None:
        self.planner = PoolPlanner()
        self.planner.set_view(pool("A10"), declared=True)
        self.world = World()

    def turn(self, resource: ModelDeployment, times: int = 6) -> None:
        for _ in range(times):
            self.planner.plan({KEY: resource}, {"hf://o/n": SMALL}, {KEY: self.world.observed()})
            step(self.world, resource, self.planner.results[KEY], self.planner.room.get(KEY))
            self.world.advance()

    def share(self, variant: str) -> float:
        plan = self.planner.results[KEY][variant].plan
        assert plan is not None
        return plan.accelerators_per_replica


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.turn(small())
    assert machine.world.ready("a") == machine.world.ready("b") == 1
    assert 0 < machine.share("a") + machine.share("b") <= 1
    return machine


def small(**fields: Any) -> ModelDeployment:
    return deployment(engine={"maxModelLen": 4096}, **{"variants": BOTH} | fields)


def test_nothing_is_started_twice(machine: Machine) -> None:
    machine.turn(small(), times=10)
    assert len(machine.world.started) == 2


def test_measurements_restart_nothing(machine: Machine) -> None:
    """Both report their memory at once, and both plans are asked for again."""
    plans = {name: result.plan for name, result in machine.planner.results[KEY].items()}
    rows = []
    for name, plan in plans.items():
        assert plan is not None
        measured = {
            "accelerator": "A10",
            "tensorParallel": 1,
            "weightsGiB": f"{plan.weights_gib * 1.02:.2f}",
            "kvCacheGiB": f"{plan.kv_cache_gib * 1.03:.2f}",
            "kvCacheTokens": int(plan.kv_cache_tokens * 1.03),
        }
        rows.append({"name": name, "ready": 1, "desired": 1, "measurements": [measured]})
    body = small().model_dump(by_alias=True, exclude_none=True, mode="json")
    body["status"] = {"observedGeneration": 1, "variants": rows}
    resource = parse_object(body)
    assert isinstance(resource, ModelDeployment)
    machine.turn(resource)
    assert len(machine.world.started) == 2
    assert machine.world.ready("a") == machine.world.ready("b") == 1


def test_who_stays_alone_keeps_its_share(machine: Machine) -> None:
    share = machine.share("a")
    machine.turn(small(variants=BOTH[:1]))
    assert len(machine.world.started) == 2
    assert machine.share("a") == share


def test_one_that_comes_later_does_not_move_what_runs() -> None:
    machine = Machine()
    machine.turn(small(variants=BOTH[:1]))
    assert machine.share("a") == 1
    machine.turn(small())
    assert machine.world.ready("a") == 1
    assert len(machine.world.started) == 1
    assert machine.planner.results[KEY]["b"].reason == "AcceleratorsNotFree"
