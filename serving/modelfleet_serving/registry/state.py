"""What the registry knows and how it changes. Pure: every call is given the time.

Two counters tell of changes: the table's version is the routers', and :attr:`Registry.state_version` the
operator's, who also looks at what no router sees.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from modelfleet_serving.contract import (
    DemandReply,
    DemandReport,
    EndpointState,
    Heartbeat,
    HeartbeatReply,
    RegistryState,
    RouterInfo,
    RouteSpec,
)
from modelfleet_serving.registry.demand import Demand
from modelfleet_serving.registry.endpoints import Change, Endpoints, TooManyError
from modelfleet_serving.registry.keys import DeploymentKey
from modelfleet_serving.registry.routes import Routes, model_route
from modelfleet_serving.registry.table import VersionedTable
from modelfleet_serving.registry.tenants import TenantAccounts


@dataclass(frozen=True)
class Settings:
    """Times in seconds, and bounds."""

    interval: float = 1.0
    """Between two heartbeats of a replica, while there are few."""
    heartbeats_per_second: float = 500.0
    """Of all replicas together: the interval grows with their number to keep this."""
    lease: float = 10.0
    lease_intervals: float = 4.0
    """A lease is at least so many intervals."""
    settle: float = 5.0
    """A registry that starts publishes once it has heard nothing new for so long. Replicas that can't reach
    it try again after at most 2 s."""
    settle_limit: float = 60.0
    """And at the latest after so long, if it has routes."""
    reconnect: float = 2.0
    """A replica whose connection has ended and that isn't heard of for so long was killed: one that lives
    reports at once."""
    router_lease: float = 5.0
    """A router that neither polls nor reports for so long has ended."""
    stall: float = 2.0
    """Between two ticks: more than that, and it was us who didn't listen."""
    demand_period: float = 5.0
    """The operator hears at least this often of demand that changes."""
    max_replicas: int = 20_000
    max_routers: int = 1_000
    max_routes: int = 10_000


@dataclass
class _Router:
    seen: float
    version: int = 0
    """Of our epoch; 0 has taken over nothing from us yet."""
    polls: int = 0
    """Open long polls: it is alive as long as it holds one."""


class SupersededError(Exception):
    """A later leader has spoken: this one was cut off, and does not know that it was replaced."""


class Registry:
    """The registry without its server.

    Args:
        epoch: unique for this registry's life.
        now: monotonic time, as in all calls.
    """

    def __init__(self, epoch: str, now: float, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.table = VersionedTable(epoch)
        self.state_version = 1
        self.term: int | None = None
        """The highest term of leadership that an operator has spoken for."""
        self.warming = True
        self.endpoints = Endpoints(self.settings.max_replicas)
        self.routes = Routes()
        self._demand = Demand()
        self._tenants = TenantAccounts()
        self._routers: dict[str, _Router] = {}
        self._connections: Counter[str] = Counter()
        self._model_names: dict[DeploymentKey, str] = {}
        self._started = now
        self._news = now
        """When we last heard of something that had been there before us."""
        self._complete = False
        self._ticked = now
        self._demand_told = now
        self._demand_dirty = False

    @property
    def epoch(self) -> str:
        """Of this registry's life."""
        return self.table.epoch

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats of a replica."""
        return max(self.settings.interval, len(self.endpoints) / self.settings.heartbeats_per_second)

    @property
    def lease(self) -> float:
        """Seconds without a heartbeat after which a replica is dropped."""
        return max(self.settings.lease, self.settings.lease_intervals * self.interval)

    def heartbeat(self, heartbeat: Heartbeat, now: float) -> HeartbeatReply:
        """Take in a heartbeat.

        Raises:
            UnknownApplicationError: it belongs to no application.
            TooManyError: there are as many replicas as may be.
        """
        change = self.endpoints.beat(heartbeat, now + self.lease)
        if change.rediscovered:
            self._news = now
        self._apply(change)
        return HeartbeatReply(
            interval_seconds=self.interval,
            lease_seconds=self.lease,
            table_version=self.table.version,
            confirmed_version=self.confirmed(now),
            epoch=self.epoch,
        )

    def connected(self, replica: str) -> None:
        """A replica holds a connection open.

        Raises:
            TooManyError: as many are as may be.
        """
        if len(self._connections) >= self.settings.max_replicas:
            raise TooManyError(f"{self.settings.max_replicas} replicas are connected")
        self._connections[replica] += 1

    def disconnected(self, replica: str, now: float) -> None:
        """Such a connection has ended; with its last one, the replica may have."""
        self._connections[replica] -= 1
        if not self._connections[replica]:
            del self._connections[replica]
            self.endpoints.shorten(replica, now + self.settings.reconnect)

    def heed(self, term: int) -> None:
        """An operator speaks that leads in this term.

        Raises:
            SupersededError: another has spoken for a later one.
        """
        if self.term is not None and term < self.term:
            raise SupersededError(f"the leader of term {self.term} has taken over from that of term {term}")
        if term != self.term:
            self.term = term
            self.state_version += 1

    def put_route(self, spec: RouteSpec, now: float) -> None:
        """Set the route of a ModelDeployment.

        Raises:
            InvalidRouteError: it contradicts itself.
            RouteConflictError: a name is another's.
            TooManyError: there are as many routes as may be.
        """
        key = (spec.namespace, spec.deployment)
        if self.routes.get(key) is None and len(self.routes) >= self.settings.max_routes:
            raise TooManyError(f"{self.settings.max_routes} routes are set")
        if self.routes.put(spec):
            self._news = now
            self._apply(Change(deployments=frozenset({key}), visible=True))

    def delete_route(self, namespace: str, deployment: str) -> None:
        """Withdraw a route."""
        key = (namespace, deployment)
        if self.routes.delete(key):
            self._apply(Change(deployments=frozenset({key}), visible=True))

    def complete_routes(self) -> None:
        """There are no further routes, and it may be none: a young registry need not wait for the first."""
        self._complete = True

    def demand(self, report: DemandReport, now: float) -> DemandReply:
        """Take in a router's report; what it has to know of the other routers.

        Raises:
            TooManyError: there are as many routers as may be.
        """
        router = self._see(report.router, now)
        if report.epoch == self.epoch:
            # A report may be older than the poll that came before it.
            router.version = max(router.version, min(report.version, self.table.version))
        before = self._demand.waiting()
        if self._demand.report(report, now):
            self._demand_dirty = True
        if self._demand.waiting() != before:
            # The first request for a model that is scaled to zero must not wait for a period to end.
            self._tell_demand(now)
        alive = sum(self._lives(router, now) for router in self._routers.values())
        return DemandReply(routers=alive, tenants=self._tenants.report(report.router, report.tenants, now))

    def open_poll(self, router: str, epoch: str, version: int, now: float) -> None:
        """A router asks for what follows a version: it has taken over that one.

        Raises:
            TooManyError: there are as many routers as may be.
        """
        known = self._see(router, now)
        known.polls += 1
        known.version = min(version, self.table.version) if epoch == self.epoch else 0

    def close_poll(self, router: str, now: float) -> None:
        """The poll is answered or broken off."""
        if (known := self._routers.get(router)) is not None:
            known.polls -= 1
            known.seen = now

    def confirmed(self, now: float) -> int:
        """Every live router uses at least this version of the table."""
        if self.warming:
            return 0  # routers that we don't know yet use a table that we didn't make
        versions = [r.version for r in self._routers.values() if self._lives(r, now)]
        return min(versions, default=self.table.version)

    def tick(self, now: float) -> None:
        """Let time pass: leases end, and a young registry settles."""
        gap = now - self._ticked
        self._ticked = now
        if gap > self.settings.stall:
            self.endpoints.extend(gap)
            for router in self._routers.values():
                router.seen += gap
        self._apply(self.endpoints.expire(now))
        for name in [name for name, router in self._routers.items() if not self._lives(router, now)]:
            del self._routers[name]
            self._demand.forget(name)
            self._tenants.forget(name)
            self.state_version += 1
        if self._demand_dirty and now - self._demand_told >= self.settings.demand_period:
            self._tell_demand(now)
        if self.warming and self._settled(now):
            self.warming = False
            self.state_version += 1

    def state(self, now: float) -> RegistryState:
        """What the operator observes."""
        routers = [
            RouterInfo(id=name, version=router.version, seen_seconds_ago=self._age(router, now))
            for name, router in sorted(self._routers.items())
        ]
        return RegistryState(
            epoch=self.epoch,
            version=self.state_version,
            warming=self.warming,
            endpoints=list(self.endpoints),
            routes=self.routes.digests(),
            demand=self._demand.total(now),
            routers=routers,
            term=self.term,
        )

    def routers(self) -> int:
        """Number of routers."""
        return len(self._routers)

    def endpoint_counts(self) -> dict[EndpointState, int]:
        """Replicas by state."""
        return self.endpoints.count()

    def _settled(self, now: float) -> bool:
        if not len(self.routes) and not self._complete:
            return False  # an operator that is away, too, is no reason to empty the routers' tables
        quiet = now - self._news >= self.settings.settle and now - self._started >= self.settings.settle
        return quiet or now - self._started >= self.settings.settle_limit

    def _apply(self, change: Change) -> None:
        self._rebuild(change.deployments)
        if change.visible:
            self.state_version += 1

    def _rebuild(self, keys: Iterable[DeploymentKey]) -> None:
        # Old names go first: another deployment of the same change may have taken one over.
        for key in keys:
            spec = self.routes.get(key)
            name = self._model_names.get(key)
            if name is not None and (spec is None or spec.name != name):
                self.table.remove(name)
                del self._model_names[key]
            variants = {v.name for v in spec.variants} if spec is not None else set()
            self.endpoints.incidents.keep(key, variants | self.endpoints.variants(key))
            if spec is not None:
                self._model_names[key] = spec.name
                self.table.set(model_route(spec, self.endpoints.of(key)))

    def _see(self, name: str, now: float) -> _Router:
        router = self._routers.get(name)
        if router is None:
            if len(self._routers) >= self.settings.max_routers:
                raise TooManyError(f"{self.settings.max_routers} routers are known")
            router = self._routers[name] = _Router(seen=now)
            self.state_version += 1
        router.seen = now
        return router

    def _lives(self, router: _Router, now: float) -> bool:
        return router.polls > 0 or now - router.seen < self.settings.router_lease

    def _age(self, router: _Router, now: float) -> float:
        return 0.0 if router.polls else math.floor((now - router.seen) * 1000) / 1000

    def _tell_demand(self, now: float) -> None:
        self.state_version += 1
        self._demand_told = now
        self._demand_dirty = False
