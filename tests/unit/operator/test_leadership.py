"""A leader that was replaced and does not know: neither the registry nor itself heeds what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
import msgspec
import pytest
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.models import V1LeaseSpec
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from tests.unit.operator.test_controller import NoHub
from tests.unit.operator.test_pure import deployment, pool

from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient, SupersededError
from modelfleet_operator.controller import PoolController
from modelfleet_operator.election import _Lock
from modelfleet_operator.facts import FactsCache
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.reconcile.applications import ApplicationState
from modelfleet_operator.reports import Report
from modelfleet_serving.contract import RouteSpec, VariantRouteSpec
from modelfleet_serving.registry.server import RegistryServer

ROUTE = RouteSpec(
    name="m", namespace="n", deployment="d", variants=[VariantRouteSpec(name="a", revisions={"r": 100})]
)


@pytest.fixture
async def registry() -> AsyncIterator[RegistryServer]:
    server = RegistryServer(token=None)
    async with server.running("127.0.0.1", 0):
        yield server


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def client(
    session: aiohttp.ClientSession, registry: RegistryServer, leadership: Leadership
) -> RegistryClient:
    return RegistryClient(session, f"http://127.0.0.1:{registry.port}", lambda: None, lambda: leadership.term)


async def test_the_registry_refuses_routes_of_an_older_term(
    session: aiohttp.ClientSession, registry: RegistryServer
) -> None:
    old, new = (client(session, registry, Leadership(term)) for term in (4, 5))
    await old.put_route(ROUTE)
    await new.state()  # one look is enough: it may have nothing to write
    for write in (old.put_route(ROUTE), old.delete_route("n", "d"), old.complete_routes()):
        with pytest.raises(SupersededError, match="term 5 has taken over from that of term 4"):
            await write
    state = await old.state()
    assert state is not None
    assert state.term == 5
    assert list(state.routes) == ["n/d"]
    await new.delete_route("n", "d")


async def test_who_elects_no_leader_sends_no_term_and_is_heard(
    session: aiohttp.ClientSession, registry: RegistryServer
) -> None:
    await client(session, registry, Leadership(7)).put_route(ROUTE)
    await client(session, registry, Leadership()).delete_route("n", "d")


class SharedRay(RayServeClient):
    """One cluster that two operators write to."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(session, "http://ray.invalid", lambda: None)
        self.running: dict[str, dict[str, Any]] = {}
        self.puts = 0

    async def applications(self) -> dict[str, ApplicationState]:
        return {n: ApplicationState(n, "RUNNING", config=c) for n, c in self.running.items()}

    async def put(self, configs: Iterable[bytes]) -> None:
        self.running = {config["name"]: config for config in map(msgspec.json.decode, configs)}
        self.puts += 1


async def nobody(_: list[Report]) -> None:
    pass


class Operator:
    """One operator's controller."""

    def __init__(
        self, session: aiohttp.ClientSession, registry: RegistryServer, ray: SharedRay, term: int
    ) -> None:
        self.leadership = Leadership(term)
        self.client = client(session, registry, self.leadership)
        self.controller = PoolController(
            pool=pool(), ray=ray, registry=self.client, registry_address=self.client.address,
            facts=FactsCache(NoHub()), report=nobody, leadership=self.leadership,
        )  # fmt: skip

    async def turn(self, weight: int) -> None:
        """See the registry, want this weight, do what follows."""
        routing = {"weights": {"a": weight}}
        self.controller.put(deployment("m", routing=routing))
        self.controller._see_registry(await self.client.state())
        await self.controller.step()


async def test_a_leader_that_is_cut_off_leaves_everything_to_its_successor(
    session: aiohttp.ClientSession, registry: RegistryServer
) -> None:
    ray = SharedRay(session)
    old, new = (Operator(session, registry, ray, term) for term in (1, 2))
    await old.turn(weight=1)
    old.leadership.cut_off = True
    await new.turn(weight=2)
    for _ in range(3):
        await old.turn(weight=1)
        await new.turn(weight=2)
    route = registry.registry.routes.get(("default", "m"))
    assert route is not None
    assert route.weights == {"a": 2}
    assert old.leadership.superseded
    puts = ray.puts
    old.controller.put(deployment("other"))
    await old.controller.step()
    assert ray.puts == puts
    # It was right after all: what waited is written.
    old.leadership.term = 3
    old.controller._see_registry(await old.client.state())
    await old.controller.step()
    assert any(".other." in name for name in ray.running)
    assert registry.registry.term == 3


async def test_what_it_had_already_decided_is_refused_too(
    session: aiohttp.ClientSession, registry: RegistryServer
) -> None:
    ray = SharedRay(session)
    old, new = (Operator(session, registry, ray, term) for term in (1, 2))
    await old.turn(weight=1)
    await new.turn(weight=2)
    old.controller.put(deployment("m", routing={"weights": {"a": 9}}))
    await old.controller.step()  # without a look at the registry
    route = registry.registry.routes.get(("default", "m"))
    assert route is not None
    assert route.weights == {"a": 2}


class TestTheTermInTheLease:
    @staticmethod
    def renewed(lock: _Lock, holder: str | None, transitions: int | None) -> int:
        record = LeaderElectionRecord("me", "15", "2026-01-01 00:00:00.0", "2026-01-01 00:00:00.0")
        before = V1LeaseSpec(holder_identity=holder, lease_transitions=transitions)
        return int(lock.update_lease(record, before).lease_transitions)

    @pytest.fixture
    def lock(self) -> _Lock:
        return _Lock("l", "n", "me", ApiClient(Configuration()))

    async def test_grows_with_each_new_holder_and_stays_with_one(self, lock: _Lock) -> None:
        assert self.renewed(lock, "another", 3) == 4
        assert self.renewed(lock, None, 3) == 4  # given back
        assert self.renewed(lock, "another", None) == 1
        assert self.renewed(lock, "me", 4) == 4

    async def test_a_holder_goes_ahead_of_what_registries_remember(self, lock: _Lock) -> None:
        """The Lease was made anew: its count began again, and a registry goes by the old one."""
        lock.leadership.term = 0
        lock.leadership.heard_of(7)
        lock.leadership.term = self.renewed(lock, "me", 0)
        assert lock.leadership.term == 8
        assert not lock.leadership.superseded
        assert self.renewed(lock, "me", 8) == 8
