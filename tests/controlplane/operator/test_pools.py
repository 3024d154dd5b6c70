"""ServingPools: shared, in use, changed, gone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.controlplane.bed import CommandError, wait_until
from tests.controlplane.operator.conftest import SYSTEM
from tests.controlplane.operator.processes import OperatorProcess, RegistryProcess
from tests.controlplane.operator.standin import RayStandIn, RayThread
from tests.controlplane.operator.world import GROUP, World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]


def test_status_says_what_is_free_and_who_uses_it(world: World) -> None:
    world.ray.ray.nodes = [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:A10": 1.0}, {"CPU": 2.0}]
    with world.operator() as operator:
        operator.wait_ready()
        world.apply(
            deployment(variants=[{"name": "a", "accelerators": [{"type": "A10"}], "replicas": {"min": 3}}])
        )
        world.wait_condition("Ready")

        def counted() -> bool:
            rows = world.get("default", "spool")["status"]["accelerators"]
            return rows[0] == {"type": "A10", "total": 4, "used": 3, "free": 1, "obtainable": 12}

        wait_until(counted, timeout=20, what="accelerators counted")
        status = world.get("default", "spool")["status"]
        assert status["usedBy"] == [f"{world.namespace}/m"]
        assert status["free"] == "A10 13/16, T4 16/16"
        table = world.cluster.kubectl("get", "spool", "-n", world.namespace)
        assert "A10 13/16, T4 16/16" in table


def test_a_pool_in_use_is_not_deleted(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    wait_until(
        lambda: world.get("default", "spool")["status"].get("usedBy") == [f"{world.namespace}/m"],
        timeout=10,
        what="usedBy",
    )
    with pytest.raises(CommandError, match=rf"used by 1 ModelDeployments: {world.namespace}/m"):
        world.cluster.kubectl("delete", "spool", "default", "-n", world.namespace)
    # The second line: a deletion that got past the policy waits for the users.
    note = "modelfleet.io/allow-delete=true"
    world.cluster.kubectl("annotate", "spool", "default", "-n", world.namespace, note)
    world.cluster.kubectl("delete", "spool", "default", "-n", world.namespace, "--wait=false")
    message = world.wait_condition("Ready", "False", "default", reason="InUse", resource="spool")
    assert f"{world.namespace}/m" in message
    assert world.condition("Serving")[0] == "True"
    world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--timeout=20s")
    wait_until(
        lambda: world.cluster.find("spool", "default", world.namespace) is None,
        timeout=15,
        what="the pool gone",
    )


def test_a_move_to_another_pool_keeps_serving(
    world: World, operator: OperatorProcess, tmp_path: Path
) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    wait_until(lambda: world.route() is not None, timeout=10, what="the route")
    token = world.registry.token
    with RegistryProcess(tmp_path, token) as registry:
        registry.wait_ready()
        with RayThread(RayStandIn(registry=registry.url, token=token, start_seconds=2.0)) as ray:
            there = replace(world, registry=registry, ray=ray)
            there.make_pool("other")
            world.wait_condition("Ready", name="other", resource="spool", timeout=30)
            world.apply(deployment(pool="other"))
            served = []

            def moved() -> bool:
                here, elsewhere = world.route(), there.route()
                served.append(
                    any(r is not None and all(v.endpoints for v in r.variants) for r in (here, elsewhere))
                )
                return not world.ray.names() and bool(elsewhere)

            world.wait_condition("Progressing", reason="MovingPool", timeout=5)
            assert world.condition("Serving")[0] == "True"
            assert world.get()["status"]["pool"] == f"{world.namespace}/default"
            wait_until(moved, timeout=30, what="the old pool empty", interval=0.02)
            assert all(served)
            world.wait_condition("Ready")
            assert world.get()["status"]["pool"] == f"{world.namespace}/other"
            assert world.route() is None
            assert len(ray.names()) == 2
            world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--timeout=20s")


def test_a_restart_goes_on_with_a_move(world: World, tmp_path: Path) -> None:
    token = world.registry.token
    with RegistryProcess(tmp_path, token) as registry:
        registry.wait_ready()
        with RayThread(RayStandIn(registry=registry.url, token=token)) as ray:
            there = replace(world, registry=registry, ray=ray)
            with world.operator() as first:
                first.wait_ready()
                world.apply(deployment())
                world.wait_condition("Ready")
                there.make_pool("other")
                ray.ray.never_start = {"A10"}
                world.wait_condition("Ready", name="other", resource="spool", timeout=30)
                world.apply(deployment(pool="other"))
                world.wait_condition("Progressing", reason="MovingPool")
                first.kill()
            running, asked = world.ray.names(), world.ray.ray.gets
            with world.operator() as second:
                second.wait_ready()
                wait_until(lambda: world.ray.ray.gets > asked, timeout=15, what="a look at the old pool")
                time.sleep(1)  # what it took for a stray would be gone
                world.wait_condition("Serving")
                assert world.ray.names() == running
                ray.ray.never_start = set()
                world.wait_condition("Ready", timeout=30)
                wait_until(lambda: not world.ray.names(), timeout=10, what="the old pool empty")
                world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--timeout=20s")


def test_teams_share_the_pool_of_the_platform(world: World) -> None:
    pool = world.get("default", "spool")
    shared = {
        "apiVersion": GROUP, "kind": "ServingPool", "metadata": {"name": "shared", "namespace": SYSTEM},
        "spec": pool["spec"],
    }  # fmt: skip
    secret = world.cluster.get("secret", "ray-token", world.namespace)
    copy = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ray-token", "namespace": SYSTEM}}
    world.cluster.kubectl("delete", "spool", "default", "-n", world.namespace)
    world.cluster.apply({**copy, "data": secret["data"]}, shared)
    try:
        with world.operator(WATCH_NAMESPACES=f"{world.namespace},{SYSTEM}") as operator:
            operator.wait_ready()
            world.apply(deployment(pool="shared"))
            world.wait_condition("Ready")
            world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--timeout=20s")
            wait_until(
                lambda: not world.cluster.get("spool", "shared", SYSTEM)["status"].get("usedBy"),
                timeout=10,
                what="nobody uses it",
            )
            world.cluster.kubectl("delete", "spool", "shared", "-n", SYSTEM, "--timeout=20s")
    finally:
        world.cluster.kubectl("delete", "spool", "shared", "-n", SYSTEM, "--ignore-not-found", "--wait=false")


def test_two_pools_do_not_speak_for_one_cluster(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    world.make_pool("twin")
    message = world.wait_condition("Accepted", "False", "twin", reason="ClusterInUse", resource="spool")
    assert f"{world.namespace}/default" in message
    assert len(world.ray.names()) == 2


def test_a_changed_pool_is_planned_with(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment(variants=[{"name": "a", "accelerators": [{"type": "A100-80G"}]}]))
    world.wait_condition("Fits", "False", reason="AcceleratorNotInPool")
    groups = [{"type": "A100-80G", "gpusPerNode": 1, "maxNodes": 1}]
    world.make_pool(accelerators=groups)
    world.wait_condition("Ready")


def test_room_that_is_given_back_is_used(world: World, operator: OperatorProcess) -> None:
    world.make_pool(accelerators=[{"type": "A10", "gpusPerNode": 1, "maxNodes": 1}])
    only = [{"name": "a", "accelerators": [{"type": "A10"}]}]
    world.apply(deployment("first", variants=only))
    world.wait_condition("Ready", name="first")
    world.apply(deployment("second", variants=only))
    world.wait_condition("Fits", "Unknown", "second", reason="AcceleratorsNotFree")
    world.cluster.kubectl("delete", "mdep", "first", "-n", world.namespace, "--timeout=20s")
    world.wait_condition("Ready", name="second")


def test_a_secret_that_comes_later_is_read(world: World) -> None:
    secret = world.cluster.get("secret", "ray-token", world.namespace)
    world.cluster.kubectl("delete", "secret", "ray-token", "-n", world.namespace)
    world.apply(deployment())
    with world.operator() as operator:
        operator.wait_ready()
        for data, complaint in ((None, "not found"), ({"tokn": secret["data"]["token"]}, "has no key token")):
            if data is not None:
                world.cluster.apply(_ray_token(data), namespace=world.namespace)
            wait_until(
                lambda text=complaint: text in world.condition("ClusterReady", "default", "spool")[2],  # type: ignore[misc]
                timeout=20,
                what=f"the pool says that the Secret {complaint}",
            )
        assert world.condition("Ready", "default", "spool")[0] != "True"
        assert not world.ray.names(), "Ray was written to without its token"
        world.cluster.apply(_ray_token(secret["data"]), namespace=world.namespace)
        world.wait_condition("Ready", name="default", resource="spool", timeout=20)
        world.wait_condition("Ready")
        for form in (secret["data"]["token"], world.registry.token):
            assert form not in operator.text()


def _ray_token(data: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ray-token"}, "data": data}


def test_a_pool_goes_right_after_its_last_model(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    world.cluster.kubectl("delete", "mdep", "m", "-n", world.namespace, "--timeout=20s")
    world.cluster.kubectl("delete", "spool", "default", "-n", world.namespace, "--timeout=20s")


def test_a_pool_without_models_becomes_ready(world: World, tmp_path: Path) -> None:
    with RegistryProcess(tmp_path, world.registry.token) as young:
        young.wait_ready()
        token = {"name": "ray-token", "key": "token"}
        world.make_pool(ray={"address": world.ray.url, "registry": young.url, "authToken": token})
        with world.operator() as operator:
            operator.wait_ready()
            world.wait_condition("Ready", "True", "default", resource="spool", timeout=30)
