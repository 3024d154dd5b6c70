"""For how long each variant has needed fewer replicas than it has: what scaling down waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.reconcile.autoscale import needed_replicas
from modelfleet_operator.reconcile.core import Decision, demand_of, smallest_capacity
from modelfleet_operator.reconcile.observed import Snapshot


@dataclass
class CalmTracker:
    """Remembers since when; the one thing that is remembered, and losing it only delays scaling down."""

    since: dict[tuple[str, str], float] = field(default_factory=dict)

    def seconds(self, now: float) -> dict[tuple[str, str], float]:
        """Seconds of calm by ModelDeployment and variant.

        Args:
            now: monotonic seconds.
        """
        return {key: now - start for key, start in self.since.items()}

    def update(
        self,
        decisions: Mapping[str, Decision],
        snapshot: Snapshot,
        deployments: Mapping[str, ModelDeployment],
        now: float,
    ) -> None:
        """Take a step's decisions in."""
        calm: dict[tuple[str, str], float] = {}
        for key, decision in decisions.items():
            observed = snapshot.of(key)
            bounds = {v.name: v.replicas for v in deployments[key].spec.variants}
            for row in decision.variants:
                need = needed_replicas(
                    bounds[row.name], demand_of(row.name, observed), smallest_capacity(row.name, observed)
                )
                if need < row.replicas:
                    calm[key, row.name] = self.since.get((key, row.name), now)
        self.since = calm
