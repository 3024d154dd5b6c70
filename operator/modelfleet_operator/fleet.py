"""Everything that the operator has seen of the API, and who works on it.

Events only say that something may have changed; what follows is worked out from what is known now. Nothing is
remembered that the API, Ray and the registry don't hold: a restart begins with a list of everything.
:mod:`.deployments` has the ModelDeployments, :mod:`.serving_pools` the pools that they run in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, SERVING_POOL, Kind, Object
from modelfleet_operator.deployments import Deployments
from modelfleet_operator.metrics import CONDITIONS, ERRORS
from modelfleet_operator.pools import PoolRunner, Tools
from modelfleet_operator.seen import address_of, key_of
from modelfleet_operator.serving_pools import ServingPools

log = logging.getLogger(__name__)


@dataclass
class Fleet:
    """Everything that the operator works on.

    Attributes:
        tools: clients and settings.
    """

    tools: Tools
    heartbeat: float = field(default_factory=time.monotonic)
    """Monotonic time of the last sign of the resync loop: liveness."""
    pools: ServingPools = field(init=False)
    deployments: Deployments = field(init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pools = ServingPools(self.tools, self._spawn)
        self.deployments = self.pools.users = Deployments(self.tools, self.pools, self._spawn)

    @property
    def synced(self) -> bool:
        """Whether everything has been listed once."""
        return self.pools.working

    @property
    def runners(self) -> list[PoolRunner]:
        """Pools at work."""
        return self.pools.runners

    # --- Events ---

    def saw_deployment(self, event: str | None, body: Object) -> None:
        """Take an event about a ModelDeployment in."""
        self.deployments.saw(event, body)

    def saw_pool(self, event: str | None, body: Object) -> None:
        """Take an event about a ServingPool in."""
        self.pools.saw(event, body)

    # --- Lists ---

    async def sync(self) -> None:
        """List everything: what events may have missed is seen, what is gone is forgotten.

        Raises:
            ClientError: the API server can't be reached.
        """
        began = time.monotonic()
        pools, deployments = await self._list(SERVING_POOL), await self._list(MODEL_DEPLOYMENT)
        for body in pools:
            self._guarded(self.pools.take, body, began)
        for body in deployments:
            self._guarded(self.deployments.take, body, began)
        # Before any pool starts: it removes what it does not know. What was seen since may be newer.
        listed = {key_of(body) for body in deployments}
        for key, entry in list(self.deployments.seen.items()):
            if key not in listed and entry.at < began:
                self.deployments.forget(key)
        listed = {key_of(body) for body in pools}
        for key, pool in list(self.pools.seen.items()):
            if key not in listed and pool.at < began:
                self.pools.forget(key)
        self.pools.start()

    def _guarded(self, take: Callable[[Object, float], None], body: Object, began: float) -> None:
        """Take a listed object in; a fault that it brings to light must not end the work on all others."""
        try:
            take(body, began)
        except Exception:
            ERRORS.labels(reason="InternalError").inc()
            log.exception("%s %s can't be taken in", body["kind"], key_of(body))

    async def _list(self, kind: Kind) -> list[Object]:
        namespaces: Sequence[str | None] = self.tools.settings.watch_namespaces or (None,)
        found = [await self.tools.kube.list(kind, namespace) for namespace in namespaces]
        return [body for page in found for body in page]

    # --- Work ---

    async def run(self) -> None:
        """List everything now and then, and count conditions, until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self.tools.settings.resync_seconds
        while True:
            await asyncio.sleep(5.0)
            self.heartbeat = time.monotonic()
            for runner in self.runners:
                if runner.failed is not None:
                    raise runner.failed
            self.deployments.follow_moves()
            self._count_conditions()
            if loop.time() < due:
                continue
            due = loop.time() + self.tools.settings.resync_seconds
            try:
                await self.sync()
            except ClientError as error:  # what is known goes on; the watches tell what changes
                ERRORS.labels(reason="ApiServer").inc()
                log.warning("resync: %s", error)

    async def close(self) -> None:
        """Stop all work; everything that runs in Ray goes on."""
        await self.pools.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _count_conditions(self) -> None:
        CONDITIONS.clear()
        for kind, keys in ((MODEL_DEPLOYMENT, self.deployments.seen), (SERVING_POOL, self.pools.seen)):
            for key in keys:
                for condition in self.tools.writer.status_of(address_of(kind, key)).get("conditions", ()):
                    CONDITIONS.labels(kind.kind, condition["type"], condition["status"]).inc()
