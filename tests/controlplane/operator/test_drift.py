"""What was changed behind the operator's back is repaired, and what it can't see is left alone."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.processes import OperatorProcess, RegistryProcess
from tests.controlplane.operator.standin import RayStandIn, RayThread
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


class TestOwnRegistry:
    """With a registry that the test may end."""

    @pytest.fixture
    def registry(self, tmp_path: Path) -> Iterator[RegistryProcess]:
        with RegistryProcess(tmp_path, secrets.token_hex(16)) as process:
            process.wait_ready()
            yield process

    @pytest.fixture
    def ray(self, registry: RegistryProcess) -> Iterator[RayThread]:
        with RayThread(RayStandIn(registry=registry.url, token=registry.token)) as thread:
            yield thread

    def test_a_lost_registry_gets_its_routes_back(
        self, world: World, operator: OperatorProcess, registry: RegistryProcess
    ) -> None:
        world.apply(deployment())
        world.wait_condition("Ready", timeout=25)
        before = world.ray.ray.puts
        registry.kill()
        world.wait_condition("RegistryReady", "False", "default", resource="spool", timeout=20)
        registry.start()
        registry.wait_ready()
        wait_until(lambda: world.route() is not None, timeout=30, what="the route again")
        world.wait_condition("Ready", name="default", resource="spool", timeout=30)
        world.wait_condition("Ready")
        assert world.ray.ray.puts == before, "nothing is removed or restarted for want of a registry"


def test_an_application_removed_by_hand_comes_back(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    lost = min(world.ray.names())
    world.ray.remove(lost)
    wait_until(lambda: lost in world.ray.names(), timeout=45, what="the application again")
    assert world.ray.ray.started[lost] == 2


def test_ray_that_is_away_is_said_and_waited_for(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    running = world.ray.names()
    world.ray.ray.down = True
    world.apply(deployment(engine={"type": "Simulator", "maxModelLen": 512}))
    world.wait_condition(
        "ClusterReady", "False", "default", reason="RayUnreachable", resource="spool", timeout=20
    )
    world.wait_condition("Ready", "Unknown", reason="RayUnreachable", timeout=20)
    assert world.condition("Serving")[0] == "True"
    assert world.ray.names() == running
    world.ray.ray.down = False
    world.wait_condition("Ready", timeout=30)
    assert not world.ray.names() & running


def test_applications_of_others_stay(world: World, operator: OperatorProcess) -> None:
    world.ray.ray.apps["theirs"] = _foreign()
    world.apply(deployment())
    world.wait_condition("Ready")
    world.ray.ray.apps["theirs-too"] = _foreign("theirs-too")
    world.ray.ray._body = None
    world.apply(deployment(engine={"type": "Simulator", "maxModelLen": 256}))
    wait_until(lambda: world.ray.ray.puts >= 2, timeout=20, what="another PUT")
    world.wait_condition("Ready")
    assert {"theirs", "theirs-too"} <= world.ray.names()
    assert not world.ray.ray.restarted


def test_a_status_that_somebody_changed_is_not_believed(world: World) -> None:
    with world.operator(RESYNC_SECONDS="5") as operator:
        operator.wait_ready()
        world.apply(deployment())
        world.wait_condition("Ready")
        patch = '{"status":{"ready":"9/9"}}'
        world.cluster.kubectl(
            "patch", "mdep", "m", "-n", world.namespace, "--subresource=status", "--type=merge", "-p", patch
        )
        wait_until(lambda: world.get()["status"]["ready"] == "2/2", timeout=25, what="the truth again")


def _foreign(name: str = "theirs") -> object:
    from tests.controlplane.operator.standin import App

    return App({"name": name, "import_path": "x:y", "route_prefix": f"/{name}"})
