"""All ServingPools that were seen, and what works on each.

A pool that is accepted has a :class:`.pools.PoolRunner`. Two pools of one Ray cluster would remove each
other's applications: the older one has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from modelfleet_operator.api import InvalidResourcesError, ServingPool, parse_object
from modelfleet_operator.clients.kube import SERVING_POOL, Object
from modelfleet_operator.pool_access import dashboard_of
from modelfleet_operator.pools import PoolRunner, Tools
from modelfleet_operator.reports import Report
from modelfleet_operator.seen import SeenPool, address_of, is_same, is_stale, key_of
from modelfleet_operator.statuses import refuse_pool

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
"""Starts work in the background, under a name."""


class PoolUsers(Protocol):
    """Those whose ModelDeployments are in the pools."""

    def place_all(self, key: str) -> None:
        """Look again where the ModelDeployments belong that may be this pool's."""

    def disconnected(self, runner: PoolRunner) -> None:
        """A pool is worked on no longer, or by another runner."""

    def report(self, runner: PoolRunner, reports: list[Report]) -> None:
        """Take over what a pool's controller says of its ModelDeployments."""

    def on_gone(self, runner: PoolRunner, key: str) -> None:
        """Nothing of a removed ModelDeployment is left in a pool."""


@dataclass
class ServingPools:
    """ServingPools by ``namespace/name``.

    Attributes:
        tools: clients and settings.
        spawn: starts work in the background.
        working: whether pools begin to work as soon as they are accepted: not before everything was listed,
            for a pool removes what it does not know.
        users: told of what happens to pools.
    """

    tools: Tools
    spawn: Spawn
    working: bool = False
    seen: dict[str, SeenPool] = field(default_factory=dict)
    users: PoolUsers = field(init=False)

    def get(self, key: str) -> SeenPool | None:
        """A pool."""
        return self.seen.get(key)

    @property
    def runners(self) -> list[PoolRunner]:
        """Pools at work."""
        return [p.runner for p in self.seen.values() if p.runner is not None]

    def start(self) -> None:
        """Everything was listed: let all pools work."""
        self.working = True
        for pool in self.seen.values():
            self._start(pool)

    async def stop(self) -> None:
        """End all work; everything that runs in Ray goes on."""
        for runner in self.runners:
            await runner.stop()

    def saw(self, event: str | None, body: Object) -> None:
        """Take an event about a ServingPool in."""
        if event == "DELETED":
            pool = self.seen.get(key_of(body))
            if pool is not None and pool.body["metadata"]["uid"] == body["metadata"]["uid"]:
                self.forget(key_of(body))
        else:
            self.take(body)

    def take(self, body: Object, listed: float | None = None) -> None:
        """Take a ServingPool in.

        Args:
            body: the object.
            listed: monotonic time at which the list began that has it; ``None`` for an event.
        """
        key = key_of(body)
        before = self.seen.get(key)
        if before is not None and is_stale(body, before, listed):
            return
        if before is not None and before.body["metadata"]["uid"] != body["metadata"]["uid"]:
            self.forget(key)
            before = None
        authoritative = listed is not None
        self.tools.writer.saw(SERVING_POOL, body, authoritative=authoritative)
        if before is not None and not authoritative and is_same(body, before.body):
            before.take(body)
            return
        pool = before or SeenPool(body, None)
        pool.take(body)
        self.seen[key] = pool
        self._parse(pool)
        self._connect(key, pool)
        self.release_unused(key)

    def _parse(self, pool: SeenPool) -> None:
        pool.problems = ""
        try:
            parsed = parse_object(pool.body)
        except InvalidResourcesError as error:
            pool.problems = "; ".join(f"{p.field}: {p.message}" for p in error.problems)
            return
        assert isinstance(parsed, ServingPool)  # noqa: S101  watched by kind
        pool.parsed = parsed

    def _connect(self, key: str, pool: SeenPool) -> None:
        """Have a runner that works as the pool asks; none for a pool that can't be accepted."""
        if pool.problems or pool.parsed is None:
            refuse_pool(self.tools.writer, pool, "InvalidSpec", pool.problems)
            return
        rival = self._same_cluster(key, pool.parsed)
        if rival is not None:
            pool.problems = f"ServingPool {rival} has the same Ray cluster: one pool speaks for a cluster"
            self._disconnect(pool)
            refuse_pool(self.tools.writer, pool, "ClusterInUse", pool.problems)
            self.users.place_all(key)
            return
        if pool.runner is not None and pool.runner.set_pool(pool.parsed):
            return
        self._disconnect(pool)
        pool.runner = PoolRunner(pool.parsed, self.tools, self.users.report, self.users.on_gone)
        self.users.place_all(key)
        if self.working:
            self._start(pool)

    def _same_cluster(self, key: str, pool: ServingPool) -> str | None:
        """An older pool with the same address: the two would remove each other's applications."""
        address = dashboard_of(pool)
        rivals = [
            other.parsed
            for name, other in self.seen.items()
            if name != key and other.parsed and dashboard_of(other.parsed) == address
        ]
        older = [r for r in rivals if _seniority(r) < _seniority(pool)]
        return min(older, key=_seniority).key if older else None

    def _start(self, pool: SeenPool) -> None:
        if pool.runner is not None and not pool.runner.started:
            pool.runner.start()

    def _disconnect(self, pool: SeenPool) -> None:
        runner, pool.runner = pool.runner, None
        if runner is not None:
            self.users.disconnected(runner)
            self.spawn(runner.stop(), f"stop {runner.pool.key}")

    def forget(self, key: str) -> None:
        """A ServingPool is gone."""
        pool = self.seen.pop(key, None)
        if pool is None:
            return
        self._disconnect(pool)
        self.tools.writer.forget(address_of(SERVING_POOL, key))
        self.users.place_all(key)
        # One that had to stand back for it may come forward.
        for other, waiting in list(self.seen.items()):
            if waiting.runner is None:
                self._parse(waiting)
                self._connect(other, waiting)

    def release_unused(self, key: str) -> None:
        """Let a pool go that is being deleted and that nobody uses."""
        pool = self.seen.get(key)
        if pool is None or not pool.deleting or pool.releasing is not None:
            return
        if pool.runner is None or not pool.runner.users:
            address = address_of(SERVING_POOL, key_of(pool.body))
            pool.releasing = self.spawn(self.tools.writer.release(address), f"release {key_of(pool.body)}")


def _seniority(pool: ServingPool) -> tuple[str, str]:
    return (pool.metadata.creation_timestamp or "", pool.key)
