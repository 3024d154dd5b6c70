"""Plans beside the event loop: what changes while a large plan is worked out waits for the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.planner import PlanResult, PoolView
from modelfleet_operator.planner.inputs import Facts
from modelfleet_operator.reconcile.observed import Observed
from modelfleet_operator.reconcile.planning import PoolPlanner

_CHUNK: Final = 50
"""Up to how many ModelDeployments are planned without a thread."""


@dataclass
class BackgroundPlanner:
    """Plans of one pool."""

    _planner: PoolPlanner = field(default_factory=PoolPlanner)
    """Touched in :meth:`plan` alone, and read between its calls: it may work in a thread."""
    _view: tuple[PoolView, bool] | None = None
    _forgotten: set[str] = field(default_factory=set)
    _planned: dict[str, ModelDeployment] = field(default_factory=dict)
    """What the answers are about: a ModelDeployment may have changed while they were worked out."""

    def plans(self, deployment: ModelDeployment) -> Mapping[str, PlanResult] | None:
        """The planner's answers for exactly this state of a ModelDeployment, by variant; ``None`` before."""
        if self._planned.get(deployment.key) is not deployment:
            return None
        return self._planner.results[deployment.key]

    def room(self, key: str) -> Mapping[str, bool]:
        """Whether a second revision of a variant fits beside the running one, where one is due."""
        return self._planner.room.get(key, {})

    def set_view(self, view: PoolView, *, declared: bool) -> None:
        """Take over what the pool has to give, ``declared`` where the administrator changed it."""
        self._view = (view, declared or (self._view is not None and self._view[1]))

    def forget(self, key: str) -> None:
        """A ModelDeployment is gone: what it holds will be free."""
        self._forgotten.add(key)
        self._planned.pop(key, None)

    def keep(self, key: str) -> None:
        """A ModelDeployment is wanted, perhaps again."""
        self._forgotten.discard(key)

    async def plan(
        self, deployments: Mapping[str, ModelDeployment], facts: Facts, observed: Mapping[str, Observed]
    ) -> set[str]:
        """Bring the plans of these ModelDeployments up to date; keys whose plans changed."""
        for key in self._forgotten:
            self._planner.forget(key)
        self._forgotten.clear()
        if self._view is not None:
            view, declared = self._view
            self._view = None
            self._planner.set_view(view, declared=declared)
        if len(deployments) <= _CHUNK:
            changed = self._planner.plan(deployments, facts, observed)
        else:  # up to seconds of pure work: other tasks go on meanwhile
            changed = await asyncio.to_thread(self._planner.plan, deployments, facts, observed)
        self._planned.update((key, d) for key, d in deployments.items() if key not in self._forgotten)
        return changed
