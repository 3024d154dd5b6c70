"""Decides for the ModelDeployments of a pool for which something changed: plan, reconcile, remember.

What one ModelDeployment brings to light stays its own: a fault in deciding leaves it as it is, with a word
of it in its status, and all others alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.background_planner import BackgroundPlanner
from modelfleet_operator.facts import FactsCache
from modelfleet_operator.metrics import ERRORS, RECONCILES
from modelfleet_operator.planner import PoolView
from modelfleet_operator.planner.inputs import sources_of
from modelfleet_operator.reconcile.calm import CalmTracker, needs
from modelfleet_operator.reconcile.core import Decision, reconcile
from modelfleet_operator.reconcile.fleet_config import FleetConfig
from modelfleet_operator.reconcile.observed import Observed, PoolSight
from modelfleet_operator.reports import Report, decided, unreachable
from modelfleet_operator.routes import RouteWriter

log = logging.getLogger(__name__)

_CHUNK: Final = 50
"""So many are decided before others get their turn."""


@dataclass
class Decider:
    """Decisions of one pool.

    Attributes:
        registry_address: the registry as replicas reach it.
        facts: what checkpoints say.
        sight: what runs, as it was last seen.
        config: told which applications shall run.
        routes: told which routes there shall be.
        decisions: the last one of each ModelDeployment.
        unsettled: those that something is under way of: Ray is asked about them soon.
    """

    registry_address: str
    facts: FactsCache
    sight: PoolSight
    config: FleetConfig
    routes: RouteWriter
    decisions: dict[str, Decision] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)
    _planner: BackgroundPlanner = field(default_factory=BackgroundPlanner)
    _calm: CalmTracker = field(default_factory=CalmTracker)
    _needs: dict[str, Mapping[str, int]] = field(default_factory=dict)
    _faults: dict[str, str] = field(default_factory=dict)
    """What went wrong in deciding, by ModelDeployment; never expected."""

    def keep(self, key: str) -> None:
        """A ModelDeployment is wanted, perhaps again."""
        self._planner.keep(key)

    def forget(self, key: str) -> None:
        """A ModelDeployment is wanted no longer."""
        self._planner.forget(key)
        self._calm.forget(key)
        for memory in (self.decisions, self._needs, self._faults):
            memory.pop(key, None)
        self.unsettled.discard(key)

    def set_view(self, view: PoolView, *, declared: bool) -> None:
        """Take over what the pool has to give, ``declared`` where the administrator changed it."""
        self._planner.set_view(view, declared=declared)

    def due(self) -> set[str]:
        """ModelDeployments that may scale down now."""
        return self._calm.due(time.monotonic())

    def needs_changed(self, deployment: ModelDeployment) -> bool:
        """Whether the demand asks for another number of replicas than at the last decision."""
        return self._needs.get(deployment.key) != needs(deployment, self._observed(deployment))

    def pending(self) -> dict[str, str]:
        """Accelerator of each variant that Ray has not placed yet, by ``namespace/name/variant``."""
        return {
            f"{key}/{row.name}": row.accelerator
            for key in self.unsettled
            if (decision := self.decisions.get(key))
            for row in decision.variants
            if row.reason == "Pending" and row.accelerator
        }

    async def decide(self, dirty: set[str], wanted: Mapping[str, ModelDeployment]) -> None:
        """Decide anew.

        Args:
            dirty: ModelDeployments that something changed for; those whose plans change with them are added.
            wanted: all ModelDeployments; it may change meanwhile.
        """
        deployments = {key: d for key in dirty if (d := wanted.get(key))}
        observed = {key: self._observed(d) for key, d in deployments.items()}
        known = self.facts.get({source for d in deployments.values() for source in sources_of(d)})
        dirty |= await self._planner.plan(deployments, known, observed) & wanted.keys()
        for number, key in enumerate(dirty & wanted.keys(), 1):
            self._guarded(wanted[key])
            if number % _CHUNK == 0:
                await asyncio.sleep(0)

    def _guarded(self, deployment: ModelDeployment) -> None:
        try:
            self._decide(deployment)
        except Exception as error:
            ERRORS.labels(reason="InternalError").inc()
            log.exception("%s can't be decided", deployment.key)
            self._faults[deployment.key] = f"{type(error).__name__}: {error}"
        else:
            self._faults.pop(deployment.key, None)

    def _decide(self, deployment: ModelDeployment) -> None:
        key, observed = deployment.key, self._observed(deployment)
        plans = self._planner.plans(deployment)
        if plans is None:
            return  # changed while it was being planned: it is dirty again
        room = self._planner.room(key)
        decision = reconcile(deployment, plans, observed, self.registry_address, room)
        RECONCILES.inc()
        self._calm.update(deployment, decision, observed, time.monotonic())
        self._needs[key] = needs(deployment, observed)
        self.decisions[key] = decision
        self.config.want(key, decision.applications)
        self.routes.want(key, decision.route)
        (self.unsettled.discard if decision.settled else self.unsettled.add)(key)

    def _observed(self, deployment: ModelDeployment) -> Observed:
        calm = self._calm.seconds(deployment.key, time.monotonic())
        return self.sight.of(deployment.key, deployment.model_name, calm)

    def reports(self, deployments: Iterable[ModelDeployment]) -> list[Report]:
        """What is known of ModelDeployments after a step."""
        deployments = list(deployments)
        sound = [d for d in deployments if d.key not in self._faults]
        reports = decided(sound, self.decisions, self.routes.refused)
        for deployment in deployments:
            if (fault := self._faults.get(deployment.key)) is not None:
                reports += unreachable([deployment], self.decisions, "InternalError", fault)
        return reports

    def reports_without_ray(
        self, deployments: Iterable[ModelDeployment], reason: str, message: str
    ) -> list[Report]:
        """What is known of ModelDeployments while Ray can't be reached."""
        return unreachable(deployments, self.decisions, reason, message)
