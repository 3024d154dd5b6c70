"""A ModelDeployment that moves to another pool: served by the one before until the new one serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.unit.operator.test_fleet import Kube, Writer

from modelfleet_operator import serving_pools
from modelfleet_operator.api import ModelDeployment, ModelDeploymentStatus, ServingPool
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, SERVING_POOL, Kind, Object
from modelfleet_operator.fleet import Fleet
from modelfleet_operator.pools import Tools
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reports import Report
from modelfleet_operator.settings import Settings

KEY = "n/m"


def body(version: int, pool: str = "old", served_by: str = "", **spec: Any) -> Object:
    found: Object = {
        "apiVersion": "modelfleet.io/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "n", "uid": "u", "resourceVersion": str(version),
                     "generation": version, "finalizers": ["modelfleet.io/operator"]},
        "spec": {"model": {"source": "hf://o/n"}, "variants": [{"name": "a"}], "pool": pool, **spec},
    }  # fmt: skip
    return found | ({"status": {"pool": served_by}} if served_by else {})


def pool(name: str) -> Object:
    return {
        "apiVersion": "modelfleet.io/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": name, "namespace": "n", "uid": name, "resourceVersion": "1", "generation": 1},
        "spec": {"ray": {"address": f"http://{name}:8265"}, "accelerators": [{"type": "A10"}]},
    }


@dataclass
class Controller:
    """What the fleet asks a pool's controller."""

    answer: bool | None = False
    deployments: dict[str, ModelDeployment] = field(default_factory=dict)

    def serves(self, key: str) -> bool | None:
        return self.answer


@dataclass
class Runner:
    """A pool at work, that does nothing by itself."""

    pool: ServingPool
    tools: Tools
    report: Callable[[Runner, list[Report]], None]
    on_gone: Callable[[Runner, str], None]
    controller: Controller = field(default_factory=Controller)
    users: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)
    started: bool = False
    failed: None = None

    def put(self, deployment: ModelDeployment) -> None:
        self.use(deployment.key)
        self.controller.deployments[deployment.key] = deployment

    def remove(self, key: str) -> None:
        self.controller.deployments.pop(key, None)
        self.held.discard(key)
        self.draining.add(key)

    def hold(self, key: str) -> None:
        self.use(key)
        self.held.add(key)

    def use(self, key: str) -> None:
        self.users.add(key)

    def leave(self, key: str) -> None:
        self.users.discard(key)

    async def leave_told(self, key: str) -> None:
        self.leave(key)

    def lost_seconds(self) -> float:
        return 0.0

    def set_pool(self, pool: ServingPool) -> bool:
        return True

    def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        pass

    # --- What a test lets it say ---

    @property
    def wants(self) -> bool:
        return KEY in self.controller.deployments

    def say(self, *findings: Finding, deployment: ModelDeployment | None = None) -> None:
        resource = deployment or self.controller.deployments[KEY]
        self.report(self, [Report(resource, None, findings)])


STARTING = (
    Finding("Progressing", "True", "RollingOut"),
    Finding("Serving", "False", "NoReadyEndpoint"),
    Finding("Ready", "False", "Starting"),
)
READY = (
    Finding("Progressing", "False", "Complete"),
    Finding("Serving", "True", "EndpointsReady"),
    Finding("Ready", "True", "AllVariantsReady"),
)


class Pools(Kube):
    async def list(self, kind: Kind, namespace: str | None = None) -> list[Object]:
        return [pool("old"), pool("new")] if kind is SERVING_POOL else list(self.deployments)


class Statuses(Writer):
    """Keeps the status that was composed last."""

    def __init__(self) -> None:
        super().__init__()
        self.status: dict[str, Any] = {}
        self.released: list[str] = []

    def set_status(self, address: Any, compose: Any, **_: Any) -> None:
        if address[0] is MODEL_DEPLOYMENT:
            self.status = compose("2026-01-01T00:00:00Z", self.status)

    def status_of(self, address: Any) -> dict[str, Any]:
        return {}

    async def release(self, address: Any) -> None:
        self.released.append(address[2])

    def condition(self, kind: str) -> tuple[str, str, str]:
        status = ModelDeploymentStatus.model_validate(self.status)
        (found,) = [c for c in status.conditions if c.type == kind]
        return found.status, found.reason, found.message


@dataclass
class World:
    fleet: Fleet
    kube: Pools
    writer: Statuses

    def runner(self, name: str) -> Runner:
        (found,) = [r for r in self.fleet.runners if r.pool.metadata.name == name]
        assert isinstance(found, Runner)
        return found

    async def serve(self) -> tuple[Runner, Runner]:
        """The old pool serves, and the user asks for the new one."""
        self.kube.deployments = [body(1)]
        await self.fleet.sync()
        old, new = self.runner("old"), self.runner("new")
        old.say(*READY)
        old.controller.answer = True
        self.fleet.saw_deployment("MODIFIED", body(2, "new"))
        return old, new


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(serving_pools, "PoolRunner", Runner)
    kube, writer = Pools(), Statuses()
    tools: Any = Tools(kube, None, None, writer, Settings())  # type: ignore[arg-type]
    return World(Fleet(tools), kube, writer)


async def test_the_pool_before_serves_until_the_new_one_does(world: World) -> None:
    old, new = await world.serve()
    assert old.wants
    assert new.wants
    new.say(*STARTING)
    assert world.writer.status["pool"] == "n/old"
    assert world.writer.condition("Serving") == (
        "True", "EndpointsReady", "in pool n/old (until pool n/new serves)",
    )  # fmt: skip
    assert world.writer.condition("Progressing")[1] == "MovingPool"
    assert world.writer.condition("Ready")[1] == "Starting"
    old.say(*READY)
    assert world.writer.condition("Ready")[1] == "Starting", "the pool before has no say"
    assert old.wants
    new.say(*READY)
    assert not old.wants
    assert old.draining == {KEY}
    assert KEY not in old.users
    assert world.writer.status["pool"] == "n/new"
    assert world.writer.condition("Progressing")[1] == "Complete"


async def test_a_new_pool_that_never_serves_takes_nothing_away(world: World) -> None:
    old, new = await world.serve()
    new.say(Finding("Serving", "False", "X"), Finding("Ready", "False", "AcceleratorsNotFree"))
    assert old.wants
    world.fleet.saw_deployment("MODIFIED", body(3, "nowhere"))
    assert old.wants
    assert not new.wants
    assert "what runs in n/old goes on" in world.writer.condition("Accepted")[2]
    world.fleet.saw_deployment("MODIFIED", body(4, "old"))
    assert old.controller.deployments[KEY].metadata.generation == 4
    old.say(*READY)
    assert world.writer.condition("Ready")[0] == "True"


@pytest.mark.parametrize("answer", [False, None])
async def test_what_serves_nobody_is_not_waited_for(world: World, answer: bool | None) -> None:
    world.kube.deployments = [body(1)]
    await world.fleet.sync()
    old = world.runner("old")
    old.controller.answer = answer
    world.fleet.saw_deployment("MODIFIED", body(2, "new"))
    assert old.wants is (answer is None), "a registry that is away proves nothing"
    if answer is None:
        old.controller.answer = False
        world.runner("new").say(*STARTING)
        assert not old.wants
        assert world.writer.condition("Serving")[0] == "False"


async def test_recreate_leaves_at_once(world: World) -> None:
    world.kube.deployments = [body(1)]
    await world.fleet.sync()
    old = world.runner("old")
    old.controller.answer = True
    world.fleet.saw_deployment("MODIFIED", body(2, "new", rollout={"strategy": "Recreate"}))
    assert not old.wants


async def test_a_restart_goes_on_with_the_move(world: World) -> None:
    world.kube.deployments = [body(2, "new", served_by="n/old")]
    await world.fleet.sync()
    old, new = world.runner("old"), world.runner("new")
    assert (old.held, old.users) == ({KEY}, {KEY}), "it stays as it runs"
    old.controller.answer = None
    new.say(*STARTING)
    assert old.held
    assert world.writer.condition("Serving")[:2] == ("Unknown", "RegistryUnavailable")
    old.controller.answer = True
    world.fleet.deployments.follow_moves()
    assert world.writer.condition("Serving")[0] == "True"
    new.say(*READY)
    assert not old.held
    assert old.draining == {KEY}


async def test_deleted_on_its_way_it_waits_for_both(world: World) -> None:
    old, new = await world.serve()
    deleted = body(3, "new")
    deleted["metadata"]["deletionTimestamp"] = "2999-01-01T00:00:00Z"
    world.fleet.saw_deployment("MODIFIED", deleted)
    assert old.draining == new.draining == {KEY}
    new.on_gone(new, KEY)
    await asyncio.sleep(0)
    assert not world.writer.released
    old.on_gone(old, KEY)
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.writer.released == ["m"]
    assert not old.users
    assert not new.users
