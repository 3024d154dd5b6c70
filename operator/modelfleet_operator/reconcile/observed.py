"""What Ray and the registry report of one ModelDeployment, put in order by variant and revision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from modelfleet_operator.reconcile.applications import ApplicationState
from modelfleet_serving.contract import (
    ApplicationId,
    EndpointState,
    Heartbeat,
    ModelDemand,
    RegistryState,
    parse_application_name,
)


@dataclass(frozen=True)
class Revision:
    """One revision of a variant as it runs."""

    application: ApplicationState | None
    """``None`` when Ray no longer lists what still sends heartbeats."""
    endpoints: tuple[Heartbeat, ...] = ()

    @property
    def ready(self) -> int:
        """Replicas that answer requests."""
        return sum(e.state == EndpointState.READY for e in self.endpoints)

    @property
    def failure(self) -> Heartbeat | None:
        """A failed replica, the one with the most restarts."""
        failed = [e for e in self.endpoints if e.state == EndpointState.FAILED]
        return max(failed, key=lambda e: e.restarts, default=None)


@dataclass(frozen=True)
class Observed:
    """One ModelDeployment as it runs.

    Attributes:
        variants: revisions by variant and revision hash, of variants that the spec no longer has, too.
        demand: what routers report, by variant; the empty name stands for requests without a variant yet.
        blind: the registry is away or warming: an absent endpoint means nothing.
        calm_seconds: for how long each variant has needed fewer replicas than it has.
    """

    variants: Mapping[str, Mapping[str, Revision]] = field(default_factory=dict)
    demand: Mapping[str, ModelDemand] = field(default_factory=dict)
    blind: bool = False
    calm_seconds: Mapping[str, float] = field(default_factory=dict)

    def revisions(self, variant: str) -> Mapping[str, Revision]:
        """Revisions of a variant."""
        return self.variants.get(variant, {})


@dataclass(frozen=True)
class Snapshot:
    """A pool as it runs, in order by ModelDeployment (``namespace/name``)."""

    deployments: Mapping[str, Observed]
    foreign: tuple[ApplicationState, ...]
    """Applications that are not ours: left as they are."""

    def of(self, key: str, blind: bool = False) -> Observed:
        """What is seen of one ModelDeployment."""
        return self.deployments.get(key) or Observed(blind=blind)


def sort_out(
    applications: Mapping[str, ApplicationState],
    registry: RegistryState | None,
    models: Mapping[str, str],
    calm_seconds: Mapping[tuple[str, str], float] | None = None,
) -> Snapshot:
    """Put everything that a pool reports in order.

    Args:
        applications: of Ray Serve, by name.
        registry: its state; ``None`` while it can't be reached.
        models: key of the ModelDeployment by OpenAI model id, for demand.
        calm_seconds: by ModelDeployment and variant.
    """
    blind = registry is None or registry.warming
    endpoints = registry.endpoints if registry else []
    tree: dict[str, dict[str, dict[str, list[Heartbeat]]]] = {}
    foreign = []
    for name, state in applications.items():
        if identity := parse_application_name(name):
            _place(tree, identity)
        else:
            foreign.append(state)
    for endpoint in endpoints:
        if identity := parse_application_name(endpoint.application):
            _place(tree, identity).append(endpoint)
    demand: dict[str, dict[str, ModelDemand]] = {}
    for entry in registry.demand if registry else []:
        if key := models.get(entry.model):
            demand.setdefault(key, {})[entry.variant] = entry
    calm: dict[str, dict[str, float]] = {}
    for (key, variant), seconds in (calm_seconds or {}).items():
        calm.setdefault(key, {})[variant] = seconds
    return Snapshot(
        deployments={
            key: Observed(
                variants=_revisions(key, tree.get(key, {}), applications),
                demand=demand.get(key, {}),
                blind=blind,
                calm_seconds=calm.get(key, {}),
            )
            for key in tree.keys() | demand.keys()
        },
        foreign=tuple(foreign),
    )


def _place(tree: dict[str, dict[str, dict[str, list[Heartbeat]]]], at: ApplicationId) -> list[Heartbeat]:
    variants = tree.setdefault(f"{at.namespace}/{at.deployment}", {})
    return variants.setdefault(at.variant, {}).setdefault(at.revision, [])


def _revisions(
    key: str,
    variants: Mapping[str, Mapping[str, Iterable[Heartbeat]]],
    applications: Mapping[str, ApplicationState],
) -> dict[str, dict[str, Revision]]:
    namespace, _, deployment = key.partition("/")
    return {
        variant: {
            revision: Revision(
                application=applications.get(f"{namespace}.{deployment}.{variant}.{revision}"),
                endpoints=tuple(endpoints),
            )
            for revision, endpoints in revisions.items()
        }
        for variant, revisions in variants.items()
    }
