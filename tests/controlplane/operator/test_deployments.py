"""The way of a ModelDeployment: applied, serving, changed, deleted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.watching import RouterPoll, Watch, has
from tests.controlplane.operator.world import World, deployment

from modelfleet_serving.contract import EngineMemory

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


def test_serves_what_is_applied(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    assert {n.rsplit(".", 1)[0] for n in world.ray.names()} == {
        f"{world.namespace}.m.a",
        f"{world.namespace}.m.b",
    }
    status = world.get()["status"]
    assert status["ready"] == "2/2"
    assert {v["accelerator"] for v in status["variants"]} == {"A10", "T4"}
    wait_until(lambda: world.route() is not None, timeout=10, what="the route", interval=0.05)
    assert {v.name: len(v.endpoints) for v in world.route().variants} == {"a": 1, "b": 1}


def test_is_accepted_within_a_second(world: World, operator: OperatorProcess) -> None:
    world.wait_condition("Ready", name="default", resource="spool", timeout=30)
    with Watch(world.kubeconfig, world.namespace) as seen:
        world.apply(deployment())
        created = seen.first(lambda body: True, what="the object")
        accepted = seen.first(lambda body: has(body, "Accepted"), what="Accepted=True")
    assert accepted - created < 1


def test_a_changed_weight_is_at_the_routers_within_two_seconds(
    world: World, operator: OperatorProcess
) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    weights = {"a": 1, "b": 9}
    with Watch(world.kubeconfig, world.namespace) as seen, RouterPoll(world.registry) as router:
        router.first(lambda model: model.namespace == world.namespace, what="the route")
        world.apply(deployment(routing={"weights": weights}))
        changed = seen.first(lambda body: body["metadata"]["generation"] == 2, what="the change")
        routed = router.first(
            lambda model: model.namespace == world.namespace and model.weights == weights, what="the weights"
        )
    assert routed - changed < 2


def test_deletion_withdraws_the_route_drains_and_lets_go(world: World, operator: OperatorProcess) -> None:
    world.ray.ray.drain_seconds = 1.5
    world.apply(deployment())
    world.wait_condition("Ready")
    wait_until(lambda: world.route() is not None, timeout=10, what="the route")
    world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--wait=false")
    wait_until(lambda: world.route() is None, timeout=5, what="the route withdrawn", interval=0.05)
    assert world.cluster.find("mdep", "m", world.namespace) is not None, "let go before it drained"
    wait_until(lambda: world.cluster.find("mdep", "m", world.namespace) is None, timeout=10, what="let go")
    assert not world.ray.names()
    assert not world.ray.ray.restarted


def test_namespace_goes_although_ray_is_gone(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    world.ray.ray.down = True
    world.cluster.delete_namespace(world.namespace, timeout=40)


def test_deletion_does_not_wait_for_a_pool_that_is_not_there(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment(pool="nowhere"))
    assert "no ServingPool nowhere" in world.wait_condition("Accepted", "False", reason="PoolNotFound")
    world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--timeout=10s")


def test_the_older_keeps_a_name(world: World, operator: OperatorProcess) -> None:
    model = {"name": "shared", "source": "hf://o/n"}
    world.apply(deployment("first", model=model))
    world.wait_condition("Ready", name="first")
    # Creation times count in seconds, and twins are ordered by name.
    world.apply(deployment("second", model=model))
    message = world.wait_condition("Accepted", "False", "second", reason="NameConflict")
    assert f"shared belongs to ModelDeployment {world.namespace}/first" in message
    assert not any(".second." in name for name in world.ray.names())
    world.cluster.kubectl("delete", "mdep", "first", "-n", world.namespace, "--timeout=15s")
    world.wait_condition("Ready", name="second")


def test_rollout_keeps_serving(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    before = world.ray.names()
    served = []
    world.apply(deployment(engine={"type": "Simulator", "maxModelLen": 1024}))

    def replaced() -> bool:
        route = world.route()
        served.append(route is not None and all(v.endpoints for v in route.variants))
        return not (world.ray.names() & before)

    wait_until(replaced, timeout=20, what="the old revision gone", interval=0.02)
    world.wait_condition("Ready")
    assert all(served)
    assert not world.ray.ray.restarted


def test_restart_of_the_operator_touches_nothing(world: World) -> None:
    with world.operator() as first:
        first.wait_ready()
        world.apply(deployment())
        world.wait_condition("Ready")
        first.kill()
    puts, version = world.ray.ray.puts, world.get()["metadata"]["resourceVersion"]
    with world.operator() as second:
        second.wait_ready()
        wait_until(lambda: "reconciles_total 1.0" in second.fetch("/metrics")[1], timeout=15, what="a step")
        world.apply(deployment(routing={"weights": {"a": 1}}))
        wait_until(lambda: world.route().weights == {"a": 1, "b": 0}, timeout=10, what="new weights")
    assert world.ray.ray.puts == puts
    assert not world.ray.ray.restarted
    assert version != world.get()["metadata"]["resourceVersion"]


def test_suspended_it_keeps_its_object_and_runs_nothing(world: World, operator: OperatorProcess) -> None:
    world.ray.ray.drain_seconds = 1.5
    world.apply(deployment())
    world.wait_condition("Ready")
    world.apply(deployment(suspend=True))
    wait_until(lambda: world.route() and world.route().suspended, timeout=5, what="the route", interval=0.05)
    assert not any(v.endpoints for v in world.route().variants)
    world.wait_condition("Suspended")
    assert world.condition("Progressing")[:2] == ("True", "Draining")
    wait_until(lambda: not world.ray.names(), timeout=10, what="drained")
    world.wait_condition("Progressing", "False", timeout=5)
    assert world.condition("Serving")[:2] == ("False", "Suspended")
    assert world.condition("Ready")[:2] == ("True", "Suspended")
    line = world.cluster.kubectl("get", "mdep", "m", "-n", world.namespace, "-o", "wide").splitlines()
    assert line[1].split()[:6] == ["m", "m", "a,b", "0/2", "False", "Suspended"]
    assert dict(zip(line[0].split(), line[1].split(), strict=True))["SUSPENDED"] == "true"
    assert {v["accelerator"] for v in world.get()["status"]["variants"]} == {"A10", "T4"}
    world.apply(deployment())
    world.wait_condition("Ready", reason="AllVariantsReady")
    wait_until(lambda: not world.route().suspended, timeout=5, what="the route", interval=0.05)
    assert world.condition("Suspended")[0] == "False"


def test_events_tell_transitions_once(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    for weight in (2, 3, 4):
        world.apply(deployment(routing={"weights": {"a": weight}}))
        wait_until(_weighs(world, weight), timeout=10, what="new weights")
    events = [reason for name, reason in world.events() if name == "m"]
    wait_until(lambda: "AllVariantsReady" in [r for _, r in world.events()], timeout=5, what="the event")
    assert len(events) == len(set(events))


def test_measured_memory_is_kept_in_status(world: World, operator: OperatorProcess) -> None:
    world.ray.ray.memory = EngineMemory(weights_gib=14.25, kv_cache_gib=5.5, kv_cache_tokens=41_000)
    world.apply(deployment())
    world.wait_condition("Ready")
    expected = {"accelerator": "A10", "weightsGiB": "14.25", "kvCacheGiB": "5.50", "kvCacheTokens": 41_000}

    def measured() -> bool:
        rows = world.get()["status"]["variants"][0].get("measurements") or [{}]
        return expected.items() <= rows[0].items()

    wait_until(measured, timeout=10, what="measurements")


def test_waits_for_a_late_accelerator_then_takes_the_next(world: World) -> None:
    world.ray.ray.never_start = {"A10"}
    world.ray.ray.nodes = [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:T4": 1.0}]
    with world.operator(PENDING_SECONDS="4") as operator:
        operator.wait_ready()
        choice = [{"name": "a", "accelerators": [{"type": "A10"}, {"type": "T4"}]}]
        world.apply(deployment(variants=choice))
        world.wait_condition("Ready", timeout=20)  # not only when nodes are asked for the next time
        assert world.get()["status"]["variants"][0]["accelerator"] == "T4"


def _weighs(world: World, weight: int) -> Callable[[], bool]:
    return lambda: world.route().weights == {"a": weight, "b": 0}
