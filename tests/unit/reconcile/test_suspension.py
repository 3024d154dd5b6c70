"""A suspended ModelDeployment: nothing runs, nothing is held, and everybody is told why."""

from __future__ import annotations

from tests.unit.reconcile.world import World, condition, deployment, plan, settle, step

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.planner import ModelUnavailable
from modelfleet_operator.planner.types import (
    AcceleratorGroup,
    NodeCapacity,
    PlanResult,
    PoolView,
    Rejection,
    Rule,
)
from modelfleet_operator.reconcile.observed import Observed
from modelfleet_operator.reconcile.planning import PoolPlanner
from modelfleet_serving.contract import ModelDemand

PLANS = {"a": plan(), "b": plan("T4")}


def suspended(**fields: object) -> ModelDeployment:
    return deployment(suspend=True, **fields)


def test_what_runs_drains_and_the_route_says_why() -> None:
    world = World()
    assert not settle(world, deployment(), PLANS).route.suspended
    decision = step(world, suspended(), PLANS)
    assert decision.applications == ()
    assert decision.route.suspended
    assert [v.revisions for v in decision.route.variants] == [{}, {}], "no request goes to what drains"
    assert condition(decision, "Progressing") == ("True", "Draining")
    assert not decision.settled, "Ray is asked until it has drained"
    decision = settle(world, suspended(), PLANS)
    assert not world.apps
    assert decision.settled
    assert condition(decision, "Progressing") == ("False", "Complete")
    assert condition(decision, "Suspended") == ("True", "Suspended")
    assert condition(decision, "Serving") == ("False", "Suspended")
    assert condition(decision, "Ready") == ("True", "Suspended")
    assert {(row.reason, row.replicas, row.message) for row in decision.variants} == {("Suspended", 0, "")}
    assert [row.accelerator for row in decision.variants] == ["A10", "T4"], "its plan is kept"


def test_it_comes_back() -> None:
    world = World()
    before = settle(world, deployment(), PLANS)
    settle(world, suspended(), PLANS)
    after = settle(world, deployment(), PLANS)
    assert world.ready("a") == world.ready("b") == 1
    assert after.route == before.route
    assert condition(after, "Suspended") == ("False", "NotSuspended")
    assert condition(after, "Ready")[0] == "True"


def test_demand_starts_nothing() -> None:
    world = World(demand=[ModelDemand(model="m", queued=50, requests=50)])
    settle(world, suspended(variants=[{"name": "a", "replicas": {"min": 0, "max": 4}}]), PLANS)
    assert not world.started


def test_what_can_not_be_planned_or_seen_ends_as_well() -> None:
    for plans, registry_up in (
        (PLANS, False),
        (
            {
                "a": PlanResult(None, (Rejection("", Rule.NOT_IN_POOL, "no A10"),), message="no A10"),
                "b": plan("T4"),
            },
            True,
        ),
    ):
        world = World()
        settle(world, deployment(), PLANS)
        world.registry_up = registry_up
        decision = step(world, suspended(variants=[{"name": "a"}, {"name": "b"}]), plans)
        assert decision.applications == ()
        assert decision.variants[0].message == plans["a"].message


def test_removed_variants_do_not_stay_either() -> None:
    world = World()
    settle(world, deployment(), PLANS)
    decision = step(world, suspended(variants=[{"name": "b"}]), {"b": PLANS["b"]})
    assert decision.applications == ()
    assert [v.name for v in decision.route.variants] == ["b"]


def test_its_accelerators_are_free_for_others() -> None:
    planner = PoolPlanner()
    planner.set_view(PoolView((AcceleratorGroup("A10", (NodeCapacity((1.0,)),)),)), declared=True)
    simulated = {
        "engine": {"type": "Simulator"},
        "variants": [{"name": "a", "accelerators": [{"type": "A10"}]}],
    }
    first = deployment(**simulated)
    second = first.model_copy(update={"metadata": first.metadata.model_copy(update={"name": "second"})})
    facts = {"hf://o/n": ModelUnavailable("NotFound", "", retryable=False)}
    planner.plan({d.key: d for d in (first, second)}, facts, {})
    assert not planner.results["default/second"]["a"].fits
    changed = planner.plan({first.key: suspended(**simulated)}, facts, {first.key: Observed()})
    assert "default/second" in changed
    assert planner.results["default/second"]["a"].fits
    assert planner.results["default/m"]["a"].plan is None, "nothing is free for it now, and it says so"
