"""For how long each variant has needed fewer replicas than it has: what scaling down waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.reconcile.autoscale import SCALE_DOWN_SECONDS, needed_replicas
from modelfleet_operator.reconcile.core import Decision, demand_of, smallest_capacity
from modelfleet_operator.reconcile.observed import Observed


@dataclass
class CalmTracker:
    """Remembers since when; the one thing that is remembered, and losing it only delays scaling down."""

    since: dict[str, dict[str, float]] = field(default_factory=dict)

    def seconds(self, key: str, now: float) -> dict[str, float]:
        """Seconds of calm of a ModelDeployment's variants.

        Args:
            key: of the ModelDeployment.
            now: monotonic seconds.
        """
        return {variant: now - start for variant, start in self.since.get(key, {}).items()}

    def update(self, deployment: ModelDeployment, decision: Decision, observed: Observed, now: float) -> None:
        """Take a step's decision in."""
        before = self.since.pop(deployment.key, {})
        needed = needs(deployment, observed)
        calm = {
            row.name: before.get(row.name, now)
            for row in decision.variants
            if needed.get(row.name, row.replicas) < row.replicas
        }
        if calm:
            self.since[deployment.key] = calm

    def forget(self, key: str) -> None:
        """A ModelDeployment is gone."""
        self.since.pop(key, None)

    def due(self, now: float) -> set[str]:
        """ModelDeployments with a variant that has been calm for long enough."""
        return {
            key
            for key, variants in self.since.items()
            if any(now - start >= SCALE_DOWN_SECONDS for start in variants.values())
        }


def needs(deployment: ModelDeployment, observed: Observed) -> Mapping[str, int]:
    """Replicas that the demand needs, by variant."""
    return {
        v.name: needed_replicas(v.replicas, demand_of(v.name, observed), smallest_capacity(v.name, observed))
        for v in deployment.spec.variants
    }
