"""Variants that a spec no longer has serve on until those in their place do."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.reconcile.world import World, condition, deployment, plan, settle, step

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.planner.types import PlanResult, Rejection, Rule

PLANS = {"a": plan(), "b": plan("T4"), "c": plan("A100-80G"), "d": plan("L4")}


def with_variants(*names: str, **fields: Any) -> ModelDeployment:
    return deployment(variants=[{"name": name} for name in names], **fields)


def plans(*names: str) -> dict[str, PlanResult]:
    return {name: PLANS[name] for name in names}


def refused(rule: Rule, accelerator: str = "A10") -> PlanResult:
    rejection = Rejection(accelerator, rule, "no", retryable=True)
    return PlanResult(None, (rejection,), (), str(rule), "no")


def served(world: World, resource: ModelDeployment, answers: dict[str, PlanResult]) -> list[int]:
    """Ready replicas of all variants after each of some steps."""
    found = []
    for _ in range(6):
        step(world, resource, answers)
        found.append(sum(map(world.ready, "abcd")))
        world.advance()
    return found


def test_all_variants_renamed_in_one_apply_without_a_gap() -> None:
    world = World()
    settle(world, deployment(), PLANS)
    renamed = with_variants("c", "d")
    first = step(world, renamed, plans("c", "d"))
    assert {v.name for v in first.route.variants} == {"a", "b", "c", "d"}
    assert first.route.weights == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert first.route.fallback == ["a", "b"]
    assert condition(first, "Serving") == ("True", "EndpointsReady")
    assert condition(first, "Ready")[0] == "False"
    assert min(served(world, renamed, plans("c", "d"))) >= 2
    last = settle(world, renamed, plans("c", "d"))
    assert {name.split(".")[2] for name in world.apps} == {"c", "d"}
    assert (last.route.fallback, last.route.weights) == ([], {"c": 1, "d": 1})
    assert condition(last, "Ready")[0] == "True"


def test_one_that_is_only_removed_goes_at_once() -> None:
    world = World()
    settle(world, deployment(), PLANS)
    step(world, with_variants("b"), plans("b"))
    assert [name.split(".")[2] for name, app in world.apps.items() if not app.deleting] == ["b"]


def test_one_renamed_beside_one_that_stays_leaves_when_the_new_one_serves() -> None:
    world = World()
    settle(world, deployment(), PLANS)
    renamed = with_variants("c", "b")
    assert step(world, renamed, plans("b", "c")).route.fallback == ["a"]
    assert world.ready("a") == 1
    settle(world, renamed, plans("b", "c"))
    assert {name.split(".")[2] for name in world.apps} == {"b", "c"}


@pytest.mark.parametrize("stays", [True, False])
def test_a_broken_one_takes_no_working_one_away(stays: bool) -> None:
    world = World()
    names = ("a", "b") if stays else ("a",)
    settle(world, with_variants(*names), PLANS)
    renamed = with_variants("c", *names[1:])
    step(world, renamed, plans(*names[1:], "c"))
    world.broken = {name.rsplit(".", 1)[1] for name in world.apps if name.split(".")[2] == "c"}
    settle(world, renamed, plans(*names[1:], "c"))
    # Beside a variant that serves, nobody waits for one that fails.
    assert world.ready("a") == (0 if stays else 1)


def test_they_make_room_where_the_new_one_finds_none() -> None:
    world = World()
    settle(world, with_variants("a"), PLANS)
    full = {"c": refused(Rule.NONE_FREE)}
    step(world, with_variants("c"), full)
    assert not world.ready("a")
    world = World()
    settle(world, with_variants("a"), PLANS)
    step(world, with_variants("c", rollout={"strategy": "Surge"}), full)
    assert world.ready("a") == 1


def test_they_make_no_room_for_what_waits_for_others() -> None:
    world = World()
    answers = {"b": refused(Rule.NONE_FREE, "H100")}
    settle(world, with_variants("a", "b"), {**plans("a"), **answers})
    step(world, with_variants("c", "b"), {**plans("c"), **answers})
    assert world.ready("a") == 1
    settle(world, with_variants("c", "b"), {**plans("c"), **answers})
    assert [world.ready(name) for name in "abc"] == [0, 0, 1]


def test_a_source_that_can_not_be_read_takes_nothing_away() -> None:
    for rule in (Rule.READING_MODEL, Rule.MODEL_UNAVAILABLE, Rule.QUANTIZATION_MISMATCH):
        world = World()
        settle(world, with_variants("a"), PLANS)
        decision = settle(world, with_variants("c"), {"c": refused(rule)})
        assert world.ready("a") == 1
        assert condition(decision, "Serving")[0] == "True"
        assert condition(decision, "Ready") == ("False", str(rule))


def test_recreate_does_not_wait() -> None:
    world = World()
    settle(world, with_variants("a"), PLANS)
    step(world, with_variants("c", rollout={"strategy": "Recreate"}), plans("c"))
    assert not world.ready("a")


def test_nothing_goes_while_the_registry_is_away() -> None:
    world = World()
    settle(world, deployment(), PLANS)
    world.registry_up = False
    step(world, with_variants("b"), plans("b"))
    assert world.ready("a") == 1
    world.registry_up = True
    step(world, with_variants("b"), plans("b"))
    assert not world.ready("a")
