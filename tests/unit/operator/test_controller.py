"""One pool's steps against a Ray and a registry in memory: what a PUT says of engines that run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import aiohttp
import msgspec
import pytest
from tests.unit.operator.test_pure import deployment, pool

from modelfleet_operator import deciding
from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_operator.controller import PoolController
from modelfleet_operator.facts import FactsCache, FactsSource, Known
from modelfleet_operator.planner import AdapterFacts, ModelUnavailable
from modelfleet_operator.planner.adapters import adapter_source
from modelfleet_operator.reconcile.applications import ApplicationState
from modelfleet_operator.reconcile.core import reconcile
from modelfleet_operator.reports import Report
from modelfleet_serving.contract import RegistryState, RouteSpec

MANY = 60
"""More ModelDeployments than are planned without a thread."""


class Ray(RayServeClient):
    """Runs whatever it is told at once, and remembers every PUT."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(session, "http://ray.invalid", lambda: None)
        self.running: dict[str, dict[str, Any]] = {}
        self.puts: list[dict[str, dict[str, Any]]] = []
        self.slow: asyncio.Event | None = None
        """A PUT takes until this is set."""
        self.busy = asyncio.Event()

    async def applications(self) -> dict[str, ApplicationState]:
        await asyncio.sleep(0)
        return {
            name: ApplicationState(name, "RUNNING", config=config, running_replicas=1, total_replicas=1)
            for name, config in self.running.items()
        }

    async def put(self, configs: Iterable[bytes]) -> None:
        decoded = [msgspec.json.decode(config) for config in configs]
        if self.slow is not None:
            self.busy.set()
            await self.slow.wait()
        self.running = {config["name"]: config for config in decoded}
        self.puts.append(dict(self.running))

    def lengths(self, key: str = "m0") -> dict[str, int]:
        """Context length of each application of a ModelDeployment."""
        return {
            name: config["args"]["engine"]["maxModelLen"]
            for name, config in self.running.items()
            if name.startswith(f"default.{key}.")
        }


class Registry(RegistryClient):
    """Takes every route."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(session, "http://registry.invalid", lambda: None)
        self.routes: list[RouteSpec] = []
        self.completed = 0

    async def complete_routes(self) -> None:
        self.completed += 1

    async def put_route(self, route: RouteSpec) -> None:
        self.routes.append(route)


class NoHub:
    async def facts(self, source: str) -> Known:
        return ModelUnavailable("NotFound", source, retryable=False)


class AdapterHub:
    """Knows no model's facts, and an adapter's once it is told to."""

    def __init__(self) -> None:
        self.known = asyncio.Event()

    async def facts(self, source: str) -> Known:
        if adapter_source(source) is None:
            return ModelUnavailable("SourceNotMounted", source, retryable=False, unseen=True)
        await self.known.wait()
        return AdapterFacts(64)


class World:
    """A controller and what it works on."""

    def __init__(self, session: aiohttp.ClientSession, hub: FactsSource | None = None) -> None:
        self.ray, self.registry = Ray(session), Registry(session)
        groups = {"type": "A10", "gpusPerNode": 8, "maxNodes": 100}
        self.controller = PoolController(
            pool=pool(groups),
            ray=self.ray,
            registry=self.registry,
            registry_address="http://registry.invalid",
            facts=FactsCache(hub or NoHub()),
            report=self._report,
        )
        self.reports: list[Report] = []

    async def _report(self, reports: list[Report]) -> None:
        self.reports += reports

    def want(self, name: str, length: int = 4096) -> None:
        engine = {"type": "Simulator", "maxModelLen": length}
        self.controller.put(deployment(name, engine=engine))


async def test_a_change_while_a_large_plan_is_made_is_not_mixed_with_it() -> None:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        for number in range(MANY):
            world.want(f"m{number}")
        step = asyncio.create_task(world.controller.step())
        while not world.controller.looked:  # noqa: ASYNC110  one turn of the loop at a time
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # the plan is under way in its thread
        world.want("m0", length=8192)
        await step
        await world.controller.step()
        assert max(world.ray.lengths().values()) == 8192
        seen: dict[str, int] = {}
        for put in world.ray.puts:
            for name, config in put.items():
                length = config["args"]["engine"]["maxModelLen"]
                assert seen.setdefault(name, length) == length, "one revision, two engines"


async def test_a_put_leaves_what_runs_as_ray_last_reported_it() -> None:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        world.want("m0")
        await world.controller.step()
        (name,) = world.ray.running
        # The same revision with other arguments, as a release before this one, or after it, starts it.
        other = msgspec.json.decode(msgspec.json.encode(world.ray.running[name]))
        other["args"]["engine"]["maxNumSeqs"] = 7
        world.ray.running[name] = other
        for number in range(1, 4):
            world.want(f"m{number}")
            await world.controller.step()
            assert world.ray.puts[-1][name] == other
        assert len(world.ray.running) == 4


async def test_routes_are_written_although_ray_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        world.want("m0")
        await world.controller.step()
        world.controller.routes.see({})
        await world.controller.step()

        async def away() -> dict[str, ApplicationState]:
            raise aiohttp.ClientConnectionError

        monkeypatch.setattr(world.ray, "applications", away)
        world.registry.routes.clear()
        variants = [{"name": "b", "accelerators": [{"type": "A10"}]}]
        world.controller.put(deployment("m0", variants=variants))
        with pytest.raises(aiohttp.ClientConnectionError):
            await world.controller.step()
        assert [v.name for v in world.registry.routes[-1].variants] == ["b"]


async def test_a_registry_without_routes_is_told_that_there_are_none() -> None:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        world.controller._see_registry(RegistryState(epoch="e", version=1, warming=True))
        world.controller.hold("default/unclear")
        await world.controller.step()
        assert world.registry.completed == 0, "what can't be understood may have had a route"
        world.controller.remove("default/unclear")
        await world.controller.step()
        assert world.registry.completed == 1
        world.want("m0")
        await world.controller.step()
        world.controller._see_registry(RegistryState(epoch="e", version=2, warming=False))
        world.controller.remove("default/m0")
        await world.controller.step()
        assert world.registry.completed == 1, "a registry that has settled needs no word"


async def test_a_fault_met_with_one_is_told_there_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        decide = reconcile

        def odd(wanted: ModelDeployment, *args: Any) -> Any:
            if wanted.key == "default/m1":
                raise ZeroDivisionError("odd")
            return decide(wanted, *args)

        monkeypatch.setattr(deciding, "reconcile", odd)
        for number in range(3):
            world.want(f"m{number}")
        await world.controller.step()
        assert {name.split(".")[1] for name in world.ray.running} == {"m0", "m2"}
        told = {r.deployment.key: {f.type: f for f in r.findings} for r in world.reports}
        ready = told["default/m1"]["Ready"]
        assert (ready.status, ready.reason) == ("Unknown", "InternalError")
        assert "ZeroDivisionError: odd" in ready.message
        assert "default/m1 can't be decided" in caplog.text
        monkeypatch.setattr(deciding, "reconcile", decide)
        world.want("m1")
        await world.controller.step()
        assert {name.split(".")[1] for name in world.ray.running} == {"m0", "m1", "m2"}


async def test_a_weight_does_not_wait_for_a_slow_put() -> None:
    async with aiohttp.ClientSession() as session:
        world = World(session)
        world.controller.routes.see({})
        world.want("m0")
        await world.controller.step()
        world.ray.slow = asyncio.Event()
        world.want("m1")
        step = asyncio.create_task(world.controller.step())
        await world.ray.busy.wait()
        routing = {"weights": {"a": 7}}
        engine = {"type": "Simulator", "maxModelLen": 4096}
        world.controller.put(deployment("m0", engine=engine, routing=routing))
        async with asyncio.timeout(5):
            while world.registry.routes[-1].weights != {"a": 7}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not step.done()
        # What else changed meanwhile is put at the next step.
        world.want("m2")
        await asyncio.sleep(0.1)
        world.ray.slow.set()
        await step
        assert not any(".m2." in name for name in world.ray.running)
        await world.controller.step()
        assert any(".m2." in name for name in world.ray.running)


async def test_an_engine_waits_for_the_rank_of_its_adapters_once() -> None:
    """Started before it is known, it might have to be started again; running, it waits for no other's."""
    async with aiohttp.ClientSession() as session:
        hub = AdapterHub()
        world = World(session, hub)
        variants = [{"name": "a", "accelerators": [{"type": "A10"}]}]
        fields: dict[str, Any] = {"engine": {"type": "vLLM"}, "variants": variants}
        adapters = [{"name": "one", "source": "hf://o/one"}]
        world.controller.put(deployment("m0", **fields, adapters=adapters))
        await world.controller.step()
        assert not world.ray.running
        hub.known.set()
        await settled(world)
        (before,) = world.ray.running
        assert world.ray.running[before]["args"]["engine"]["lora"]["maxRank"] == 64
        hub.known.clear()
        adapters.append({"name": "two", "source": "hf://o/two"})
        world.controller.put(deployment("m0", **fields, adapters=adapters))
        await settled(world)
        assert world.ray.running.keys() == {before}, "the same engine"
        (config,) = world.ray.running[before]["deployments"]
        assert [a["name"] for a in config["user_config"]["adapters"]] == ["one", "two"]
        await world.controller.facts.close()


async def settled(world: World) -> None:
    """Steps, with time for what is read in the background."""
    for _ in range(4):
        await asyncio.sleep(0.01)
        world.controller.wake()
        await world.controller.step()
