"""Keeps one pool as its ModelDeployments ask: observe, plan, decide, apply; with and without Kubernetes.

All decisions are pure functions of :mod:`.planner` and :mod:`.reconcile`; this module only carries what they
need to them, and what they say to Ray, to the registry and to whoever shows the status. A step works on the
ModelDeployments for which something changed, and on no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from modelfleet_operator.api import ModelDeployment, ServingPool
from modelfleet_operator.application_writer import ApplicationWriter
from modelfleet_operator.attend import attend
from modelfleet_operator.clients.errors import RefusedError, UnavailableError
from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_operator.deciding import Decider
from modelfleet_operator.facts import FactsCache
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.metrics import ERRORS, QUEUE, STEP_SECONDS
from modelfleet_operator.planner import PoolView
from modelfleet_operator.planner.inputs import pool_view, sources_of
from modelfleet_operator.reconcile.applications import registry_application
from modelfleet_operator.reconcile.fleet_config import FleetConfig
from modelfleet_operator.reconcile.observed import PoolSight
from modelfleet_operator.registry_watch import RegistryWatch
from modelfleet_operator.reports import Report, Reporter
from modelfleet_operator.routes import RouteWriter
from modelfleet_serving.contract import RegistryState

log = logging.getLogger(__name__)

RESYNC_SECONDS: Final = 30.0
"""How often Ray is asked although nothing happened."""
PROGRESS_SECONDS: Final = 1.0
"""How soon after a change Ray is asked: it has no events to wait for."""
APPLICATIONS_PER_SECOND: Final = 200
"""Ray's answer grows with its applications: a large pool is asked less often."""
RETRY_SECONDS: Final = 2.0
GATHER_SECONDS: Final = 0.05
"""Changes that come together make one step and one PUT."""
_T = TypeVar("_T")


@dataclass
class PoolController:
    """One pool.

    Attributes:
        pool: the resource.
        ray: its Ray Serve.
        registry: its registry.
        registry_address: the registry as replicas reach it.
        facts: what checkpoints say.
        report: called with the ModelDeployments whose state changed in a step.
        serve_registry: arguments of the registry's own application, or ``None`` where somebody else runs it.
        on_gone: called with each ModelDeployment that was removed, once nothing of it is left.
        leadership: whether another operator is, or may be, at work.
        on_change: called when what is known of Ray or the registry changed.
    """

    pool: ServingPool
    ray: RayServeClient
    registry: RegistryClient
    registry_address: str
    facts: FactsCache
    report: Callable[[list[Report]], Awaitable[None]]
    serve_registry: Mapping[str, Any] | None = None
    on_gone: Callable[[str], None] = lambda _key: None
    on_change: Callable[[], None] = lambda: None
    leadership: Leadership = field(default_factory=Leadership)
    deployments: dict[str, ModelDeployment] = field(default_factory=dict)
    heartbeat: float = field(default_factory=time.monotonic)
    """Monotonic time of the loop's last turn: liveness."""
    ray_error: str = ""
    """Why Ray could not be reached at the last step."""
    ray_reason: str = ""
    """The same in one CamelCase word."""
    ray_lost: float | None = None
    """Monotonic time since when it could not."""
    registry_state: RegistryState | None = None
    registry_lost: float | None = field(default_factory=time.monotonic)
    """Monotonic time since when the registry has not answered."""
    looked: bool = False
    """Whether Ray has answered at least once."""
    sight: PoolSight = field(default_factory=PoolSight)
    _config: FleetConfig = field(default_factory=FleetConfig)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _dirty: set[str] = field(default_factory=set)
    _leaving: set[str] = field(default_factory=set)
    _keys_by_model: dict[str, str] = field(default_factory=dict)
    _keys_by_source: dict[str, set[str]] = field(default_factory=dict)
    _looked: float = float("-inf")
    _pause: float = PROGRESS_SECONDS

    def __post_init__(self) -> None:
        self.routes = RouteWriter(self.registry, self.leadership)
        self._applications = ApplicationWriter(
            self.pool.key, self.ray, self._config, self.sight, self.leadership
        )
        self._reporter = Reporter(self.report)
        self._decider = Decider(self.registry_address, self.facts, self.sight, self._config, self.routes)
        self._decider.set_view(pool_view(self.pool), declared=True)
        if self.serve_registry is not None:
            self._config.add_extra(registry_application(self.serve_registry))

    # --- What is wanted ---

    def set_deployments(self, deployments: Mapping[str, ModelDeployment]) -> None:
        """Replace everything that is wanted, by ``namespace/name``."""
        for key in self.deployments.keys() - deployments.keys():
            self.remove(key)
        for deployment in deployments.values():
            self.put(deployment)

    def put(self, deployment: ModelDeployment) -> None:
        """Want a ModelDeployment, or want it otherwise."""
        before = self.deployments.get(deployment.key)
        if before is not None and before.model_name != deployment.model_name:
            self._keys_by_model.pop(before.model_name, None)
        self.deployments[deployment.key] = deployment
        self._keys_by_model[deployment.model_name] = deployment.key
        for source in sources_of(deployment):
            self._keys_by_source.setdefault(source, set()).add(deployment.key)
        self._config.held.discard(deployment.key)
        self.routes.held.discard(deployment.key)
        self._leaving.discard(deployment.key)
        self._decider.keep(deployment.key)
        self._mark({deployment.key})

    def hold(self, key: str) -> None:
        """Leave everything of a ModelDeployment as it is: it can't be understood."""
        if key not in self.deployments:
            self._config.held.add(key)
            self.routes.held.add(key)

    def remove(self, key: str) -> None:
        """Want a ModelDeployment no longer; what ran of it drains."""
        gone = self.deployments.pop(key, None)
        if gone is not None and self._keys_by_model.get(gone.model_name) == key:
            del self._keys_by_model[gone.model_name]
        for keys in self._keys_by_source.values():
            keys.discard(key)
        self._config.held.discard(key)
        self.routes.held.discard(key)
        self._config.forget(key)
        self.routes.forget(key)
        self._decider.forget(key)
        self._reporter.forget(key)
        self._leaving.add(key)
        self._mark({key})

    def serves(self, key: str) -> bool | None:
        """Whether replicas of a ModelDeployment answer requests here; ``None`` while nobody can say."""
        return None if self.sight.blind else self.sight.ready(key)

    def set_pool(self, pool: ServingPool) -> None:
        """Take over what the administrator changed."""
        if pool.spec != self.pool.spec:
            self.pool = pool
            self.set_view(pool_view(pool), declared=True)

    def set_view(self, view: PoolView, *, declared: bool = False) -> None:
        """Take over what the pool has to give."""
        self._decider.set_view(view, declared=declared)
        self._mark(set(self.deployments) if declared else ())

    def pending(self) -> dict[str, str]:
        """Accelerator of each variant that Ray has not placed yet, by ``namespace/name/variant``."""
        return self._decider.pending()

    def wake(self) -> None:
        """Look at everything again now."""
        self._looked = float("-inf")
        self._mark(set(self.deployments))

    def _mark(self, keys: Iterable[str]) -> None:
        self._dirty.update(keys)
        QUEUE.labels(pool=self.pool.key).set(len(self._dirty))
        self._wake.set()

    # --- The loops ---

    async def run(self) -> None:
        """Work until cancelled."""
        forget = self.facts.listen(lambda source: self._mark(self._keys_by_source.get(source, ())))
        try:
            async with asyncio.TaskGroup() as group:
                watch = RegistryWatch(
                    self.registry, self.leadership, lambda: self.registry_state, self._see_registry
                )
                group.create_task(watch.run(), name=f"watch-registry {self.pool.key}")
                group.create_task(self._loop(), name=f"reconcile {self.pool.key}")
        finally:
            forget()

    def _see_registry(self, state: RegistryState | None) -> None:
        self.registry_state = state
        if state is not None:
            self.registry_lost = None
            self.leadership.heard_of(state.term)
        elif self.registry_lost is None:
            self.registry_lost = time.monotonic()
        was_blind = self.sight.blind
        changed, models = self.sight.see_registry(state)
        if self.sight.blind != was_blind:
            changed |= self.deployments.keys()  # also those that run nothing read what was not known
            self.on_change()
        for model in models:
            key = self._keys_by_model.get(model)
            # Gauges of demand move all the time: only another number of replicas is a change.
            if key is not None and self._decider.needs_changed(self.deployments[key]):
                changed.add(key)
        self.routes.see(state.routes if state else None)
        if changed or self._dirty or self.routes.due or (state and state.warming and self._wants_nothing()):
            self._mark(changed)

    async def _loop(self) -> None:
        while True:
            self.heartbeat = time.monotonic()
            try:
                await asyncio.wait_for(self._wake.wait(), self._until_next())
                await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                pass
            self._wake.clear()
            self._dirty |= self._decider.due() & self.deployments.keys()
            await self._turn()

    def _until_next(self) -> float:
        """Seconds until Ray is asked again."""
        return max(0.0, self._looked + self._interval() - time.monotonic())

    def _interval(self) -> float:
        if self.ray_error:
            return RETRY_SECONDS
        if not (self._decider.unsettled or self._leaving):
            return RESYNC_SECONDS
        return max(self._pause, len(self.sight.applications) / APPLICATIONS_PER_SECOND)

    async def _turn(self) -> None:
        with STEP_SECONDS.labels(pool=self.pool.key).time():
            try:
                await self.step()
            except UnavailableError as error:
                await self._lost(str(error), "RayUnreachable")
            except RefusedError as error:
                await self._lost(str(error), "RayRefused")
            except Exception as error:
                log.exception("pool %s: the step failed", self.pool.key)  # the next pool's goes on
                await self._lost(f"{type(error).__name__}: {error}", "InternalError")
            else:
                self.ray_lost = None
                if self.ray_error:
                    log.info("pool %s: Ray answers again", self.pool.key)
                    self.ray_error = ""
                    self._mark(set(self.deployments))
                    self.on_change()

    async def _lost(self, message: str, reason: str) -> None:
        ERRORS.labels(reason=reason).inc()
        self._looked = time.monotonic()
        if message != self.ray_error:
            log.warning("pool %s: %s", self.pool.key, message)
        if self.ray_lost is None:
            self.ray_lost = time.monotonic()
        self.ray_error, self.ray_reason = message, reason
        self.on_change()
        reports = self._decider.reports_without_ray(self.deployments.values(), reason, message)
        await self._reporter.tell(reports)

    async def step(self) -> None:
        """Do what follows from what changed.

        Raises:
            ClientError: Ray can't be reached or refuses; what was decided is decided anew at the next step.
        """
        dirty, self._dirty = self._dirty, set()
        QUEUE.labels(pool=self.pool.key).set(0)
        try:
            if self._until_next() == 0 or self.ray_error:
                dirty |= await self._look()
            await self._follow(dirty)
            if self._applications.difference(dirty):
                # A PUT says all applications, and an old sight would change what runs: Ray is asked just
                # before, and what it says is decided on.
                changed = await self._look()
                dirty |= changed
                await self._follow(changed)
                await self._put_applications(dirty)
        except Exception:
            self._dirty |= dirty
            raise
        self._let_go()

    async def _look(self) -> set[str]:
        """Ask Ray what runs."""
        seen = await self._while_routing(self.ray.applications())
        first = not self.looked
        self._looked, self.looked = time.monotonic(), True
        self._pause = min(self._pause * 1.5, RESYNC_SECONDS)
        changed = self.sight.see_applications(seen)
        if first:
            self._applications.adopt(seen)
        if first or changed:
            self.on_change()
        return changed | set(self.deployments) if first else changed

    # --- What follows ---

    async def _follow(self, dirty: set[str]) -> None:
        """Decide for these ModelDeployments, say so, and route as decided."""
        await self._decider.decide(dirty, self.deployments)
        await self._tell(dirty)
        # Before the applications: what is about to go gets no new request.
        try:
            await self.routes.write()
            if self._wants_nothing() and self.registry_state and self.registry_state.warming:
                await self.routes.complete()
        except UnavailableError as error:
            log.warning("registry lost: %s", error)
            self._see_registry(None)

    def _wants_nothing(self) -> bool:
        """Whether there is no ModelDeployment, not even one that can't be understood."""
        return not self.deployments and not self.routes.held

    async def _put_applications(self, dirty: set[str]) -> None:
        if not await self._while_routing(self._applications.write(dirty)):
            if self._applications.blocked:
                self._dirty |= dirty
            return
        self._pause = PROGRESS_SECONDS
        self._looked = time.monotonic()
        self._decider.unsettled |= {key for key in dirty if key in self.deployments}

    async def _while_routing(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for Ray, which takes seconds over many applications; routes that change go out meanwhile."""
        if not self.looked or self.ray_error:
            return await work
        later: set[str] = set()

        async def route() -> None:
            await asyncio.sleep(GATHER_SECONDS)
            news, self._dirty = self._dirty, set()
            later.update(news)
            await self._follow(news)
            later.update(news)

        try:
            return await attend(work, self._wake, route)
        finally:
            self._mark(later)

    async def _tell(self, keys: Iterable[str]) -> None:
        deployments = [d for key in keys if (d := self.deployments.get(key))]
        await self._reporter.tell(self._decider.reports(deployments))

    def _let_go(self) -> None:
        for key in list(self._leaving):
            if not self.sight.applications_of(key) and self.routes.has(key) is False:
                self._leaving.discard(key)
                self.on_gone(key)
