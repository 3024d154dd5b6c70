"""The way of a ModelDeployment: applied, serving, changed, deleted."""

from __future__ import annotations

import time

import pytest
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


def test_serves_what_is_applied(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    assert {n.rsplit(".", 1)[0] for n in world.ray.names()} == {f"{world.namespace}.m.a", f"{world.namespace}.m.b"}
    status = world.get()["status"]
    assert status["ready"] == "2/2"
    assert {v["accelerator"] for v in status["variants"]} == {"A10", "T4"}
    wait_until(lambda: world.route() is not None, timeout=10, what="the route", interval=0.05)
    assert {v.name: len(v.endpoints) for v in world.route().variants} == {"a": 1, "b": 1}


def test_is_accepted_within_a_second_and_routed_within_two(world: World, operator: OperatorProcess) -> None:
    world.wait_condition("Ready", name="default", resource="spool", timeout=30)
    began = time.monotonic()
    world.apply(deployment())
    world.wait_condition("Accepted")
    accepted = time.monotonic() - began
    world.wait_condition("Ready")
    began = time.monotonic()
    world.apply(deployment(routing={"weights": {"a": 1, "b": 9}}))
    wait_until(lambda: world.route().weights == {"a": 1, "b": 9}, timeout=10, what="new weights", interval=0.02)
    routed = time.monotonic() - began
    # kubectl itself takes a third of a second for each call, which is counted here.
    assert accepted < 1.5
    assert routed < 2
