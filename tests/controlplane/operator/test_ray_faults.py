"""A Ray that answers wrongly, or can't start what it is told to."""

from __future__ import annotations

import pytest
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]

TRACEBACK = "Traceback (most recent call last):\n" + "  File x, line 1\n" * 800 + "RuntimeError: CUDA is away"


def test_answers_of_others_change_nothing(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    running = world.ray.names()
    for answer in ((200, "{}"), (200, "<html>log in</html>"), (404, "not found"), (500, "boom " * 9000)):
        world.ray.ray.answer = answer
        world.apply(deployment(engine={"type": "Simulator", "maxModelLen": 512 + len(answer[1])}))
        message = world.wait_condition("Ready", "Unknown", reason="RayUnreachable", timeout=20)
        assert len(message) < 1200
        assert world.condition("Serving")[0] == "True"
        assert world.ray.names() == running
        world.apply(deployment())
        world.ray.ray.answer = None
        world.wait_condition("Ready", timeout=20)
        # Ray may have come back to an operator that still had the change: what that started goes again.
        wait_until(lambda: world.ray.names() == running, timeout=20, what="the applications as before")
    assert not world.ray.ray.restarted


def test_what_can_not_be_started_says_why(world: World, operator: OperatorProcess) -> None:
    world.ray.ray.failed = {f"{world.namespace}.m.a.": TRACEBACK}
    world.apply(deployment())
    message = world.wait_condition("Ready", "False", reason="DeployFailed")
    assert "RuntimeError: CUDA is away" in message
    assert len(message) < 500
    row = world.get()["status"]["variants"][0]
    assert row["message"].endswith("RuntimeError: CUDA is away")
    assert len(row["message"]) <= 8000
    wait_until(lambda: ("m", "DeployFailed") in world.events(), timeout=5, what="the event")
    wait_until(lambda: world.condition("Serving")[0] == "True", timeout=10, what="the other variant")
    world.ray.ray.failed = {}
    world.wait_condition("Ready", timeout=40)
