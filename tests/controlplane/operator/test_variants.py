"""Variants that come and go in one apply."""

from __future__ import annotations

import json

import pytest
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


def test_variants_renamed_in_one_apply_serve_without_a_gap(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    world.ray.ray.start_seconds = 1.0
    before, served = world.ray.names(), []
    choices = [{"name": "c", "accelerators": [{"type": "A10"}]}, {"name": "d"}]
    world.cluster.kubectl(
        "patch", "mdep", "m", "-n", world.namespace, "--type=merge", "-p",
        json.dumps({"spec": {"variants": choices}}),
    )  # fmt: skip

    def replaced() -> bool:
        route = world.route()
        served.append(route is not None and any(v.endpoints for v in route.variants))
        return not (world.ray.names() & before)

    wait_until(replaced, timeout=20, what="the old variants gone", interval=0.02)
    world.wait_condition("Ready")
    assert all(served)
    assert {n.split(".")[2] for n in world.ray.names()} == {"c", "d"}
    wait_until(lambda: {v.name for v in world.route().variants} == {"c", "d"}, timeout=5, what="the route")
