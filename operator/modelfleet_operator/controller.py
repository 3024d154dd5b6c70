"""Keeps one pool as its ModelDeployments ask: observe, plan, decide, apply; with and without Kubernetes.

All decisions are pure functions of :mod:`.planner` and :mod:`.reconcile`; this module only carries what they
need to them, and what they say to Ray, to the registry and to whoever shows the status.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from modelfleet_operator.api import ModelDeployment, ServingPool
from modelfleet_operator.clients.errors import ClientError, RefusedError, UnavailableError
from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_operator.planner import ModelFacts, ModelUnavailable
from modelfleet_operator.planner.inputs import pool_view
from modelfleet_operator.reconcile.applications import ApplicationState, registry_application
from modelfleet_operator.reconcile.calm import CalmTracker
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reconcile.core import Decision, reconcile
from modelfleet_operator.reconcile.observed import Observed, Snapshot, sort_out
from modelfleet_operator.reconcile.planning import PoolPlan, plan_pool
from modelfleet_operator.reconcile.status import refused_status
from modelfleet_serving.contract import REGISTRY_APPLICATION, RegistryState

log = logging.getLogger(__name__)

RESYNC_SECONDS: Final = 30.0
"""How often everything is looked at although nothing happened."""
PROGRESS_SECONDS: Final = 2.0
"""How often while something is on its way: Ray has no events to wait for."""
REGISTRY_WAIT_SECONDS: Final = 25.0
RETRY_SECONDS: Final = 2.0


class FactsSource(Protocol):
    """Reads what a checkpoint says of itself."""

    async def facts(self, source: str) -> ModelFacts | ModelUnavailable:
        """Facts of a source, or why there are none."""
        ...


@dataclass(frozen=True)
class Report:
    """What is known of one ModelDeployment after a step; ``decision`` is ``None`` where it was refused."""

    deployment: ModelDeployment
    decision: Decision | None
    findings: tuple[Finding, ...]


@dataclass
class PoolController:
    """One pool.

    Attributes:
        pool: the resource.
        ray: its Ray Serve.
        registry: its registry.
        registry_address: the registry as replicas reach it.
        facts: reads checkpoints.
        report: called with every ModelDeployment's state after each step.
        serve_registry: arguments of the registry's own application, or ``None`` where somebody else runs it.
    """

    pool: ServingPool
    ray: RayServeClient
    registry: RegistryClient
    registry_address: str
    facts: FactsSource
    report: Callable[[list[Report]], Awaitable[None]]
    serve_registry: Mapping[str, Any] | None = None
    deployments: dict[str, ModelDeployment] = field(default_factory=dict)
    heartbeat: float = 0.0
    """Monotonic time of the last step: liveness."""
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _state: RegistryState | None = None
    _calm: CalmTracker = field(default_factory=CalmTracker)
    _refused_routes: dict[str, str] = field(default_factory=dict)
    _busy: bool = True

    def set_deployments(self, deployments: Mapping[str, ModelDeployment]) -> None:
        """Replace what is wanted, by ``namespace/name``."""
        self.deployments = dict(deployments)
        self._wake.set()

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_registry(), name="watch-registry")
            group.create_task(self._loop(), name="reconcile")

    async def _watch_registry(self) -> None:
        while True:
            seen = self._state
            try:
                state = await self.registry.state(
                    seen.epoch if seen else "",
                    seen.version if seen else -1,
                    REGISTRY_WAIT_SECONDS if seen else 0,
                )
            except ClientError as error:
                if seen is not None:
                    log.warning("registry lost: %s", error)
                    self._state = None
                    self._wake.set()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if state is not None:
                self._state = state
                self._wake.set()

    async def _loop(self) -> None:
        while True:
            self._wake.clear()
            self.heartbeat = time.monotonic()
            try:
                await self.step()
            except UnavailableError as error:
                log.warning("%s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except RefusedError as error:
                log.error("%s", error)  # noqa: TRY400  the message says it all
            limit = PROGRESS_SECONDS if self._busy else RESYNC_SECONDS
            try:
                await asyncio.wait_for(self._wake.wait(), limit)
            except TimeoutError:
                continue

    async def step(self) -> None:
        """Look at everything once and do what follows.

        Raises:
            ClientError: Ray can't be reached or refuses; what was decided is decided anew at the next step.
        """
        deployments = self.deployments  # replaced as a whole, never changed: one step sees one state
        applications = await self.ray.applications()
        models = {d.model_name: key for key, d in deployments.items()}
        snapshot = sort_out(applications, self._state, models, self._calm.seconds(time.monotonic()))
        observed = {key: snapshot.of(key, blind=self._blind) for key in deployments}
        plan = await self._plan(deployments, observed)
        decisions = {
            key: reconcile(d, plan.results[key], observed[key], self.registry_address, plan.room[key])
            for key, d in deployments.items()
        }
        self._calm.update(decisions, snapshot, deployments, time.monotonic())
        # Routes first: what is about to go gets no new request.
        await self._apply_routes(decisions)
        await self._apply_applications(decisions, applications, snapshot)
        self._busy = any(
            finding.type == "Ready" and finding.status != "True"
            for decision in decisions.values()
            for finding in decision.findings
        )
        await self.report([self._report(deployments[key], decision) for key, decision in decisions.items()])

    @property
    def _blind(self) -> bool:
        return self._state is None or self._state.warming

    async def _plan(
        self, deployments: Mapping[str, ModelDeployment], observed: Mapping[str, Observed]
    ) -> PoolPlan:
        sources = {d.source(v) for d in deployments.values() for v in d.spec.variants if d.needs_facts(v)}
        found = dict(zip(sources, await asyncio.gather(*map(self.facts.facts, sources)), strict=True))
        # Seconds of pure work at a thousand deployments: other tasks go on meanwhile.
        return await asyncio.to_thread(plan_pool, deployments, found, observed, pool_view(self.pool))

    async def _apply_routes(self, decisions: Mapping[str, Decision]) -> None:
        if self._state is None:
            return
        wanted = {key: decision.route for key, decision in decisions.items()}
        for key in self._state.routes.keys() - wanted.keys():
            namespace, _, name = key.partition("/")
            await self._quietly(self.registry.delete_route(namespace, name))
        for key, route in wanted.items():
            if self._state.routes.get(key) == route.digest():
                continue
            try:
                await self.registry.put_route(route)
                self._refused_routes.pop(key, None)
            except RefusedError as error:
                self._refused_routes[key] = str(error)
            except UnavailableError as error:
                log.warning("%s", error)
                self._state = None
                return

    async def _quietly(self, call: Awaitable[None]) -> None:
        try:
            await call
        except ClientError as error:
            log.warning("%s", error)

    async def _apply_applications(
        self,
        decisions: Mapping[str, Decision],
        applications: Mapping[str, ApplicationState],
        snapshot: Snapshot,
    ) -> None:
        configs = {app.name: app.config() for d in decisions.values() for app in d.applications}
        if self.serve_registry is not None:
            configs[REGISTRY_APPLICATION] = registry_application(self.serve_registry)
        foreign = {
            a.name: a.config for a in snapshot.foreign if not a.deleting and a.name != REGISTRY_APPLICATION
        }
        running = {name: a for name, a in applications.items() if not a.deleting}
        changed = [name for name, config in configs.items() if not _runs_as(running.get(name), config)]
        gone = running.keys() - configs.keys() - foreign.keys()
        # Serve can't start an application under a name that it is still removing.
        blocked = {name for name in changed if name in applications and applications[name].deleting}
        if not (set(changed) - blocked) and not gone:
            return
        log.info("applications: %d set, %d removed", len(changed), len(gone))
        await self.ray.put([*foreign.values(), *(c for name, c in configs.items() if name not in blocked)])

    def _report(self, deployment: ModelDeployment, decision: Decision) -> Report:
        refused = self._refused_routes.get(deployment.key)
        if refused is None:
            return Report(deployment, decision, decision.findings)
        return Report(deployment, decision, refused_status(deployment, "NameTaken", refused))


def _runs_as(state: ApplicationState | None, config: Mapping[str, Any]) -> bool:
    """Whether Ray already has this configuration; Ray may report more fields than were sent."""
    return state is not None and _covers(state.config, config)


def _covers(actual: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(actual, Mapping) and all(
            (value is None and key not in actual) or _covers(actual.get(key), value)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(actual, list) and len(actual) == len(wanted) and all(map(_covers, actual, wanted))
    return bool(actual == wanted)
