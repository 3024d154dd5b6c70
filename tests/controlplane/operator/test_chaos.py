"""Trouble everywhere at once, with a fixed seed: the end is what was asked for, and no engine was touched."""

from __future__ import annotations

import random
import time

import pytest
from tests.controlplane.bed import ControlPlane, Fault, FaultProxy, wait_until
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.world import World, deployment

from modelfleet_serving.contract import parse_application_name

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(420)]

KILLS = 50
NAMES = [f"m{n}" for n in range(6)]
LENGTHS = (512, 1024, 2048)


class Wishes:
    """What the user last asked for."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.wanted: dict[str, tuple[int, int]] = {}
        """Context length (another engine) and weight (another route) by name."""

    def act(self) -> None:
        """Apply, change or delete one ModelDeployment."""
        name = self.random.choice(NAMES)
        if name in self.wanted and self.random.random() < 0.25:
            self.world.cluster.kubectl("delete", "mdep", name, "-n", self.world.namespace, "--wait=false")
            del self.wanted[name]
            return
        found = self.world.cluster.find("mdep", name, self.world.namespace)
        if found is not None and "deletionTimestamp" in found["metadata"]:
            return  # the API takes no new one before the old one is gone
        length, _ = self.wanted.get(name, (self.random.choice(LENGTHS), 1))
        if self.random.random() < 0.4:
            length = self.random.choice(LENGTHS)
        self.wanted[name] = (length, self.random.randint(1, 99))
        self.world.apply(body(name, *self.wanted[name]))


def body(name: str, length: int, weight: int) -> dict[str, object]:
    return deployment(
        name,
        engine={"type": "Simulator", "maxModelLen": length},
        routing={"weights": {"a": weight, "b": 1}},
    )


def test_ends_where_it_should_whatever_happens(control_plane: ControlPlane, world: World) -> None:
    rng = random.Random(11)
    wishes = Wishes(world, seed=7)
    with FaultProxy(control_plane, seed=3) as proxy:
        operator = world.operator(proxy.kubeconfig(world.kubeconfig))
        operator.start()
        for kill in range(KILLS):
            trouble(rng, kill, proxy, control_plane)
            wishes.act()
            if rng.random() < 0.5:
                wishes.act()
            # At a random point: while it starts and lists, or while it plans, writes and waits.
            if rng.random() < 0.6:
                operator.wait_ready(timeout=40)
                time.sleep(rng.uniform(0.0, 1.5))
            else:
                time.sleep(rng.uniform(0.0, 1.5))
            operator.kill()
            operator.start()
        proxy.clear()
        settle(world, wishes, operator)
        assert proxy.injected[409] + proxy.injected[429] > 10
        operator.stop()
    assert not world.ray.ray.restarted, "a running application was given another configuration"


def trouble(rng: random.Random, kill: int, proxy: FaultProxy, control_plane: ControlPlane) -> None:
    """Some of what can go wrong between the operator and the API server."""
    if kill % 5 == 1:
        proxy.inject(Fault(409, frozenset({"PATCH", "POST"}), probability=0.6, times=30))
        proxy.inject(Fault(429, probability=0.3, retry_after=1, times=30))
    if kill % 5 == 4:
        proxy.clear()
    if rng.random() < 0.3:
        proxy.cut_watches()
    if kill in (15, 35):
        control_plane.restart_apiserver(hard=kill == 35)


def settle(world: World, wishes: Wishes, operator: OperatorProcess) -> None:
    """Wait until everything is as it was last asked for."""
    gone = [name for name in NAMES if name not in wishes.wanted]
    for name in gone:
        wait_until(
            lambda name=name: world.cluster.find("mdep", name, world.namespace) is None,  # type: ignore[misc]
            timeout=90,
            what=f"{name} gone\n{operator.text()[-2000:]}",
        )
    for name, (length, weight) in wishes.wanted.items():
        world.apply(body(name, length, weight))  # the last word, where a delete was still under way
        world.wait_condition("Ready", name=name, timeout=60)

    def applications() -> bool:
        running: dict[str, set[str]] = {}
        for app in world.ray.names():
            identity = parse_application_name(app)
            assert identity is not None
            running.setdefault(identity.deployment, set()).add(identity.variant)
        lengths = {
            name: {a.config["args"]["engine"]["maxModelLen"] for n, a in list(world.ray.ray.apps.items())
                   if n.split(".")[1] == name and a.deleting is None}
            for name in wishes.wanted
        }  # fmt: skip
        return running == {name: {"a", "b"} for name in wishes.wanted} and all(
            lengths[name] == {length} for name, (length, _) in wishes.wanted.items()
        )

    wait_until(applications, timeout=60, what="exactly the wanted applications")

    def routes() -> bool:
        table = {m.name: m.weights["a"] for m in world.table().models if m.namespace == world.namespace}
        return table == {name: weight for name, (_, weight) in wishes.wanted.items()}

    wait_until(routes, timeout=30, what="exactly the wanted routes")
