"""Two processes: one works, the other takes over. The API server's absence alone takes nobody's work away."""

from __future__ import annotations

import time

import pytest
from tests.controlplane.bed import ControlPlane, Fault, FaultProxy, wait_until
from tests.controlplane.operator.conftest import OPERATOR, SYSTEM
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.watching import RouterPoll
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


def leads(operator: OperatorProcess) -> bool:
    return "modelfleet_operator_leader 1.0" in operator.fetch("/metrics")[1]


def told(operator: OperatorProcess) -> int:
    """How often it was told of a later leader; also by a registry that remembers a Lease before this one."""
    return operator.text().count("nothing is written")


def pair(world: World) -> tuple[OperatorProcess, OperatorProcess]:
    # The Role names the one Lease; whoever held it in an earlier test is gone.
    world.cluster.kubectl("delete", "lease", OPERATOR, "-n", SYSTEM, "--ignore-not-found")
    settings = {"LEADER_ELECTION": "true", "LEASE_SECONDS": "4"}
    return (
        world.operator(IDENTITY="one", **settings),
        world.operator(IDENTITY="two", **settings),
    )


def test_the_standby_takes_over(world: World) -> None:
    one, two = pair(world)
    with one, two:
        one.wait_ready()
        wait_until(lambda: leads(one) or leads(two), timeout=15, what="a leader")
        leader, standby = (one, two) if leads(one) else (two, one)
        standby.wait_ready()
        world.apply(deployment())
        world.wait_condition("Ready")
        puts = world.ray.ray.puts

        # A goodbye gives the Lease back at once; a death is noticed when it runs out.
        began = time.monotonic()
        assert leader.stop() < 5
        wait_until(lambda: leads(standby), timeout=10, what="the standby to lead")
        assert time.monotonic() - began < 4
        assert world.ray.ray.puts == puts, "a takeover touches nothing"

        leader.start()
        leader.wait_ready()
        began = time.monotonic()
        standby.kill()
        wait_until(lambda: leads(leader), timeout=20, what="the first to lead again")
        assert time.monotonic() - began < 12
        world.apply(deployment(routing={"weights": {"a": 5}}))
        wait_until(lambda: world.route().weights == {"a": 5, "b": 0}, timeout=15, what="new weights")


def test_works_on_without_the_api_server(control_plane: ControlPlane, world: World) -> None:
    one, _ = pair(world)
    with one:
        one.wait_ready()
        world.apply(deployment())
        world.wait_condition("Ready")
        lost = min(world.ray.names())
        control_plane.stop("kube-apiserver")
        try:
            world.ray.remove(lost)
            wait_until(lambda: lost in world.ray.names(), timeout=45, what="the application again")
            assert leads(one)
        finally:
            control_plane.start("kube-apiserver")
        wait_until(lambda: not one.ended(), timeout=1, what="the operator alive")
        world.apply(deployment(routing={"weights": {"a": 5}}))
        wait_until(lambda: world.route().weights == {"a": 5, "b": 0}, timeout=30, what="new weights")
    assert not world.ray.ray.restarted


def test_what_is_forbidden_for_a_moment_is_tried_again(control_plane: ControlPlane, world: World) -> None:
    """An API server that has just started knows no roles, and forbids everything."""
    with FaultProxy(control_plane) as proxy:
        one = world.operator(
            proxy.kubeconfig(world.kubeconfig), IDENTITY="one", LEADER_ELECTION="true", LEASE_SECONDS="4"
        )
        world.cluster.kubectl("delete", "lease", OPERATOR, "-n", SYSTEM, "--ignore-not-found")
        with one:
            one.wait_ready()
            wait_until(lambda: proxy.watches == 2, timeout=15, what="both watches")
            proxy.inject(Fault(403))
            proxy.cut_watches()
            world.apply(deployment())
            # Longer than the Lease: nobody else takes it, and nobody is sure of it.
            wait_until(lambda: proxy.injected[403] >= 8, timeout=30, what="some refusals")
            proxy.clear()
            world.wait_condition("Accepted", timeout=5)
            world.wait_condition("Ready")
            proxy.inject(Fault(403, frozenset({"PATCH"}), path="modeldeployments", times=3))
            world.apply(deployment("another"))
            world.wait_condition("Ready", name="another")
            assert leads(one)
            assert not one.ended()


def test_a_leader_that_is_cut_off_does_not_undo_its_successor(
    control_plane: ControlPlane, world: World
) -> None:
    """It still reaches Ray and the registry, and does not know that another leads."""
    world.cluster.kubectl("delete", "lease", OPERATOR, "-n", SYSTEM, "--ignore-not-found")
    with FaultProxy(control_plane) as proxy:
        through = proxy.kubeconfig(world.kubeconfig)
        one = world.operator(through, IDENTITY="one", LEADER_ELECTION="true", LEASE_SECONDS="4")
        two = world.operator(IDENTITY="two", LEADER_ELECTION="true", LEASE_SECONDS="4")
        with one:
            one.wait_ready()
            world.apply(deployment())
            world.wait_condition("Ready")
            before = told(one)
            proxy.inject(Fault(503))
            proxy.cut_watches()
            with two, RouterPoll(world.registry) as router:
                wait_until(lambda: leads(two), timeout=20, what="the standby to lead")
                assert leads(one), "nobody told it"
                world.apply(deployment(routing={"weights": {"a": 1, "b": 9}}))
                changed = router.first(lambda model: model.weights == {"a": 1, "b": 9}, what="the change")
                wait_until(lambda: told(one) > before, timeout=20, what="that it learned of the other")
                puts = world.ray.ray.puts
                world.apply(deployment(routing={"weights": {"a": 5, "b": 5}}))
                router.first(lambda model: model.weights == {"a": 5, "b": 5}, what="the next change")
                assert not router.after(changed, lambda model: model.weights == {"a": 1, "b": 1})
                assert world.ray.ray.puts == puts
                proxy.clear()
                wait_until(one.ended, timeout=20, what="the first to end")
                assert "leadership lost: two leads now" in one.text()
                assert leads(two)
