"""One ServingPool at work: its Ray cluster, the controller on it, and what the administrator reads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from modelfleet_operator.api import Condition, ModelDeployment, ServingPool
from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.kube import (
    RAY_CLUSTER,
    SECRET,
    SERVING_POOL,
    ConflictError,
    KubeClient,
    NotFoundError,
)
from modelfleet_operator.clients.ray_nodes import RayNodesClient
from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_operator.controller import PoolController
from modelfleet_operator.facts import FactsCache
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.metrics import ACCELERATORS, ERRORS
from modelfleet_operator.pending import PendingTracker
from modelfleet_operator.pool_access import dashboard_of, registry_beside, token_of
from modelfleet_operator.reconcile.applications import args_of
from modelfleet_operator.reconcile.nodes import accelerator_rows, alive_by_group, observed_view
from modelfleet_operator.reconcile.pool_status import (
    Trouble,
    accepted_pool,
    cluster_finding,
    pool_status,
    ready_finding,
    registry_finding,
)
from modelfleet_operator.reconcile.ray_cluster import (
    TOKEN_KEY,
    cluster_name,
    differs,
    engine_images,
    ray_cluster,
    token_secret,
    token_secret_name,
)
from modelfleet_operator.reports import Report
from modelfleet_operator.settings import Settings
from modelfleet_operator.writer import Address, ObjectWriter
from modelfleet_serving.contract import REGISTRY_PORT

log = logging.getLogger(__name__)

CLUSTER_SECONDS: Final = 5.0
"""How often a RayCluster of ours is compared with what it shall be."""
TOKEN_SECONDS: Final = 15.0
NODES_SECONDS: Final = 15.0
STATUS_SECONDS: Final = 1.0
LEAVE_SECONDS: Final = 3 * STATUS_SECONDS
"""How long a ModelDeployment waits at most for the pool's status to forget it."""
LEAVE_POLL_SECONDS: Final = 0.05
RETRY_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Tools:
    """What all pools share."""

    kube: KubeClient
    session: aiohttp.ClientSession
    facts: FactsCache
    writer: ObjectWriter
    settings: Settings
    leadership: Leadership = field(default_factory=Leadership)


@dataclass
class PoolRunner:
    """One pool.

    Attributes:
        pool: the resource.
        tools: shared by all pools.
        report: called with this pool and the ModelDeployments whose state changed.
        on_gone: called with this pool and each removed ModelDeployment once nothing of it is left.
        users: ModelDeployments in this pool.
    """

    pool: ServingPool
    tools: Tools
    report: Callable[[PoolRunner, list[Report]], None]
    on_gone: Callable[[PoolRunner, str], None]
    users: set[str] = field(default_factory=set)
    controller: PoolController = field(init=False)
    _token: str | None = None
    _token_trouble: Trouble | None = None
    _cluster_trouble: Trouble | None = None
    """What a cluster of ours waits for."""
    _alive: dict[str, int] | None = None
    _gpus: dict[str, tuple[str, float]] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None
    _pending: PendingTracker = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _has_token: asyncio.Event = field(default_factory=asyncio.Event)
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    """The state of ModelDeployments has changed."""

    def __post_init__(self) -> None:
        self._pending = PendingTracker(self.tools.settings.pending_seconds)
        ray = self.pool.spec.ray
        managed = ray.cluster is not None
        self.address = dashboard_of(self.pool)
        self.registry = ray.registry or registry_beside(self.address)
        session, token = self.tools.session, lambda: self._token
        self._nodes = RayNodesClient(session, self.address, token)
        self.controller = PoolController(
            pool=self.pool,
            ray=RayServeClient(session, self.address, token),
            registry=RegistryClient(session, self.registry, token, lambda: self.tools.leadership.term),
            registry_address=self.registry,
            facts=self.tools.facts,
            report=self._reported,
            serve_registry={"host": "0.0.0.0", "port": REGISTRY_PORT}  # noqa: S104  a pod's port
            if managed or ray.registry is None
            else None,
            on_gone=lambda key: self.on_gone(self, key),
            on_change=self._changed.set,
            leadership=self.tools.leadership,
        )
        self._needs_token = managed or ray.auth_token is not None
        self._began = time.monotonic()

    @property
    def where(self) -> Address:
        """The resource's place in the API."""
        return (SERVING_POOL, self.pool.metadata.namespace, self.pool.metadata.name)

    # --- ModelDeployments ---

    def put(self, deployment: ModelDeployment) -> None:
        """Want a ModelDeployment here, or want it otherwise."""
        self.use(deployment.key)
        self.controller.put(deployment)

    def remove(self, key: str) -> None:
        """Want a ModelDeployment no longer; what ran of it drains."""
        self.controller.remove(key)

    def hold(self, key: str) -> None:
        """Leave everything of a ModelDeployment as it is."""
        self.use(key)
        self.controller.hold(key)

    def use(self, key: str) -> None:
        """Count a ModelDeployment among those that keep the pool."""
        if key not in self.users:
            self.users.add(key)
            self._changed.set()

    def leave(self, key: str) -> None:
        """Count a ModelDeployment no longer."""
        if key in self.users:
            self.users.discard(key)
            self._changed.set()

    async def leave_told(self, key: str) -> None:
        """Count a ModelDeployment no longer, and let the pool's status say so, within a few seconds."""
        self.leave(key)
        deadline = time.monotonic() + LEAVE_SECONDS
        while key in self.tools.writer.status_of(self.where).get("usedBy", ()):
            if time.monotonic() > deadline:
                log.info("pool %s: its status still names %s", self.pool.key, key)
                return
            await asyncio.sleep(LEAVE_POLL_SECONDS)

    def set_pool(self, pool: ServingPool) -> bool:
        """Take over what the administrator changed; whether that works without a new connection."""
        if _connection(pool) != _connection(self.pool):
            return False
        self.pool = pool
        self.controller.set_pool(pool)
        self._look_at_capacity(declared=True)
        self._changed.set()
        return True

    def lost_seconds(self) -> float:
        """For how long Ray or the registry has not answered; 0 while both do."""
        since = [t for t in (self.controller.ray_lost, self.controller.registry_lost) if t is not None]
        return time.monotonic() - min(since) if since else 0.0

    # --- Work ---

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name=f"pool {self.pool.key}")

    async def stop(self) -> None:
        """End; what runs in the pool goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def started(self) -> bool:
        """Whether the work has begun."""
        return self._task is not None

    @property
    def failed(self) -> BaseException | None:
        """What ended the work, which should never end by itself."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return self._task.exception()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            if self.pool.spec.ray.cluster is not None:
                group.create_task(self._keep_cluster())
            group.create_task(self._keep_token())
            group.create_task(self._controller())
            group.create_task(self._watch_nodes())
            group.create_task(self._watch_pending())
            group.create_task(self._keep_status())

    async def _controller(self) -> None:
        while self._needs_token and self._token is None:
            self.controller.heartbeat = time.monotonic()
            self.controller.ray_lost = self._began
            await self._wait_for_token()
        await self.controller.run()

    async def _wait_for_token(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_token.wait(), RETRY_SECONDS)

    async def _keep_token(self) -> None:
        while self._needs_token:
            try:
                self._token = await self._read_token()
                self._token_trouble = None
                self._has_token.set()
            except ClientError as error:
                self._token_trouble = Trouble("TokenUnreadable", str(error))
                ERRORS.labels(reason="TokenUnreadable").inc()
                self._changed.set()
            await asyncio.sleep(TOKEN_SECONDS if self._token else RETRY_SECONDS)

    async def _read_token(self) -> str:
        namespace, given = self.pool.metadata.namespace, self.pool.spec.ray.auth_token
        name = given.name if given else token_secret_name(self.pool)
        key = given.key if given else TOKEN_KEY
        try:
            body = await self.tools.kube.get(SECRET, namespace, name)
        except NotFoundError:
            if given is not None:
                raise
            try:
                # One that somebody deleted comes back as it was: the cluster that runs knows no other.
                fresh = token_secret(self.pool, self._token or secrets.token_hex(32))
                body = await self.tools.kube.create(SECRET, fresh)
            except ConflictError:  # somebody else was quicker
                body = await self.tools.kube.get(SECRET, namespace, name)
        return token_of(body, key)

    async def _keep_cluster(self) -> None:
        while True:
            try:
                trouble = await self._apply_cluster()
            except ClientError as error:
                trouble = _why_no_cluster(error)
                ERRORS.labels(reason="RayCluster").inc()
                if trouble != self._cluster_trouble:
                    log.warning("pool %s: %s", self.pool.key, error)
            self._cluster_trouble = trouble
            self._changed.set()
            await asyncio.sleep(CLUSTER_SECONDS)

    async def _apply_cluster(self) -> Trouble | None:
        """Make the RayCluster what it shall be; what it waits for."""
        spec, images = self.pool.spec.ray.cluster, self.tools.settings.images
        assert spec is not None  # noqa: S101  another kind of connection makes another runner
        chosen = engine_images(spec, images.head, images.vllm, images.sglang)
        name, namespace = cluster_name(self.pool), self.pool.metadata.namespace
        try:
            running = await self.tools.kube.get(RAY_CLUSTER, namespace, name)
        except NotFoundError:
            running = None
        wanted = ray_cluster(self.pool, chosen, running)
        if running is None or differs(wanted, running):
            running = await self.tools.kube.apply(RAY_CLUSTER, wanted)
        return _waiting_for(running.get("status") or {})

    async def _watch_nodes(self) -> None:
        while self._needs_token and self._token is None:
            await self._wait_for_token()
        while True:
            try:
                nodes = await self._nodes.nodes()
            except ClientError as error:
                ERRORS.labels(reason="RayNodes").inc()
                log.debug("%s", error)
                self._alive = None
            else:
                self._alive = alive_by_group(self.pool, [n.resources for n in nodes]) if nodes else None
            self._look_at_capacity()
            self._changed.set()
            await asyncio.sleep(NODES_SECONDS)

    async def _watch_pending(self) -> None:
        """Take the next accelerator when one is late, not when nodes are asked for the next time."""
        while True:
            late = self._pending.next_late()
            try:
                pause = None if late is None else max(0.0, late - time.monotonic())
                await asyncio.wait_for(self._moved.wait(), pause)
            except TimeoutError:
                self._look_at_capacity()
            else:
                self._moved.clear()
                self._pending.note(self.controller.pending(), time.monotonic())

    def _look_at_capacity(self, *, declared: bool = False) -> None:
        waiting = self._pending.late(self.controller.pending(), time.monotonic())
        self.controller.set_view(observed_view(self.pool, self._alive, waiting), declared=declared)

    # --- What people read ---

    async def _reported(self, reports: list[Report]) -> None:
        self.report(self, reports)
        self._moved.set()
        self._changed.set()

    async def _keep_status(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self.tools.writer.set_status(self.where, self._compose)
            await asyncio.sleep(STATUS_SECONDS)

    def _compose(self, now: str, before: dict[str, Any]) -> dict[str, Any]:
        controller = self.controller
        cluster = cluster_finding(
            connected=controller.looked and not controller.ray_error and self._token_trouble is None,
            trouble=self._token_trouble or self._cluster_trouble or self._ray_trouble(),
        )
        state = controller.registry_state
        registry = registry_finding(
            connected=state is not None, warming=state is not None and state.warming, cluster=cluster
        )
        users = sorted(self.users)
        deleting = self.pool.metadata.deletion_timestamp is not None
        ready = ready_finding(cluster, registry, deleting, users)
        rows = accelerator_rows(self.pool, self._alive, self._used())
        for row in rows:
            for name, value in (("used", row.used), ("free", row.free), ("obtainable", row.obtainable)):
                ACCELERATORS.labels(pool=self.pool.key, type=row.type, state=name).set(value)
        return pool_status(
            self.pool.metadata.generation,
            (accepted_pool(self.pool), cluster, registry, ready),
            [Condition.model_validate(c) for c in before.get("conditions", ())],
            now,
            address=self.address,
            registry=self.registry,
            accelerators=rows,
            used_by=users,
        ).to_dict()

    def _ray_trouble(self) -> Trouble | None:
        error = self.controller.ray_error
        return Trouble(self.controller.ray_reason, error) if error else None

    def _used(self) -> dict[str, float]:
        used: dict[str, float] = {}
        known: dict[str, tuple[str, float]] = {}
        for name, state in self.controller.sight.applications.items():
            held = self._gpus.get(name)
            if held is None:
                args = args_of(state)
                held = (args.accelerator, args.resources.num_gpus) if args else ("", 0.0)
            known[name] = held
            used[held[0]] = used.get(held[0], 0.0) + held[1] * state.total_replicas
        self._gpus = known
        return used


def _connection(pool: ServingPool) -> object:
    ray = pool.spec.ray
    return (pool.metadata.uid, ray.address, ray.registry, ray.auth_token, ray.cluster is None)


def _why_no_cluster(error: ClientError) -> Trouble:
    if isinstance(error, NotFoundError) and "rayclusters" in str(error):
        return Trouble(
            "KubeRayNotInstalled",
            "the API server knows no RayClusters: install KubeRay 1.6 or newer, or give ray.address",
        )
    return Trouble("ClusterRefused", str(error))


def _waiting_for(status: dict[str, Any]) -> Trouble | None:
    """What a RayCluster waits for; ``None`` when its head is ready."""
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    head = conditions.get("HeadPodReady")
    if head is None:
        return Trouble("ClusterStarting", "KubeRay has not taken the RayCluster up yet")
    if head["status"] == "True":
        return None
    why = head.get("message") or head.get("reason", "")
    return Trouble("ClusterStarting", f"the Ray head is not ready: {why}")
