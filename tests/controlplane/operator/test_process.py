"""The process itself: health, metrics, SIGTERM, permissions."""

from __future__ import annotations

import pytest
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


def test_tells_its_health_and_ends_in_time(world: World) -> None:
    operator = world.operator(prepared=False)
    with operator:
        operator.wait_ready()
        world.apply(deployment())
        world.wait_condition("Ready")
        assert operator.fetch("/healthz") == (200, "ok")
        text = operator.fetch("/metrics")[1]
        for name in (
            "reconciles_total",
            "step_duration_seconds_bucket",
            "queue_length",
            "route_writes_total",
        ):
            assert f"modelfleet_operator_{name}" in text
        wait_until(
            lambda: (
                'conditions{kind="ModelDeployment",status="True",type="Ready"} 1.0'
                in operator.fetch("/metrics")[1]
            ),
            timeout=10,
            what="conditions counted",
        )
        assert operator.stop() < 5
    assert "Traceback" not in operator.text()
    # What runs goes on.
    assert len(world.ray.names()) == 2
