"""What went wrong with replicas, counted by variant. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from modelfleet_serving.contract import ApplicationId, Heartbeat
from modelfleet_serving.registry.keys import DeploymentKey


@dataclass
class VariantIncidents:
    """Counts of one variant; they only grow."""

    model: str
    restarts: int = 0
    """Engines that their supervisors started again."""
    lost: int = 0
    """Replicas that ended without a goodbye."""


@dataclass
class Incidents:
    """Counts of the variants that there are."""

    _counts: dict[DeploymentKey, dict[str, VariantIncidents]] = field(default_factory=dict)

    def heard(self, application: ApplicationId, before: Heartbeat | None, now: Heartbeat) -> None:
        """Take in a heartbeat. What had been before the first one of a replica isn't known to be new."""
        counts = self._of(application, now.model)
        if before is not None:
            counts.restarts += max(0, now.restarts - before.restarts)

    def lost(self, application: ApplicationId, last: Heartbeat) -> None:
        """A replica is gone, and did not say so."""
        self._of(application, last.model).lost += 1

    def keep(self, key: DeploymentKey, variants: Collection[str]) -> None:
        """Forget the other variants of a deployment: they are gone for good."""
        known = self._counts.get(key)
        if known is None:
            return
        for name in known.keys() - set(variants):
            del known[name]
        if not known:
            del self._counts[key]

    def __iter__(self) -> Iterator[tuple[str, VariantIncidents]]:
        """Variants with their counts."""
        return (item for variants in self._counts.values() for item in variants.items())

    def _of(self, application: ApplicationId, model: str) -> VariantIncidents:
        variants = self._counts.setdefault((application.namespace, application.deployment), {})
        return variants.setdefault(application.variant, VariantIncidents(model))
