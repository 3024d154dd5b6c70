"""What Ray and the registry report of one ModelDeployment, put in order by variant and revision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from modelfleet_operator.reconcile.applications import ApplicationState
from modelfleet_serving.contract import (
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


class PoolSight:
    """Everything that a pool reports, kept in order by ModelDeployment; says whose part of it changed.

    Load, sequence numbers and the like change all the time and mean nothing to a reconcile step.
    """

    def __init__(self) -> None:
        self.applications: Mapping[str, ApplicationState] = {}
        self.blind = True
        self._applications_of: dict[str, dict[str, ApplicationState]] = {}
        self._endpoints_of: dict[str, tuple[Heartbeat, ...]] = {}
        self._demand_of: dict[str, dict[str, ModelDemand]] = {}

    def see_applications(self, applications: Mapping[str, ApplicationState]) -> set[str]:
        """Take over what Ray Serve reports; keys of the ModelDeployments that it changed something for."""
        before, self.applications = self.applications, applications
        changed = set()
        for name in before.keys() | applications.keys():
            now = applications.get(name)
            if now is before.get(name) or (key := _key_of(name)) is None:
                continue
            mine = self._applications_of.setdefault(key, {})
            if now is None:
                mine.pop(name, None)
            else:
                mine[name] = now
            if not mine:
                del self._applications_of[key]
            changed.add(key)
        return changed

    def see_registry(self, registry: RegistryState | None) -> tuple[set[str], set[str]]:
        """Take over what the registry reports; ``None`` while it can't be reached.

        Returns:
            Keys of the ModelDeployments whose endpoints changed, and models whose demand changed.
        """
        blind = registry is None or registry.warming
        flipped, self.blind = blind != self.blind, blind
        endpoints: dict[str, list[Heartbeat]] = {}
        for heartbeat in registry.endpoints if registry else []:
            if (key := _key_of(heartbeat.application)) is not None:
                endpoints.setdefault(key, []).append(heartbeat)
        before = self._endpoints_of
        self._endpoints_of = {
            key: tuple(sorted(found, key=lambda e: e.id)) for key, found in endpoints.items()
        }
        changed = {
            key
            for key in before.keys() | self._endpoints_of.keys()
            if _shape(before.get(key, ())) != _shape(self._endpoints_of.get(key, ()))
        }
        if flipped:
            changed |= self._endpoints_of.keys() | self._applications_of.keys()
        return changed, self._see_demand(registry.demand if registry else [])

    def _see_demand(self, entries: Iterable[ModelDemand]) -> set[str]:
        before = self._demand_of
        self._demand_of = {}
        for entry in entries:
            self._demand_of.setdefault(entry.model, {})[entry.variant] = entry
        return {
            model
            for model in before.keys() | self._demand_of.keys()
            if before.get(model) != self._demand_of.get(model)
        }

    def of(self, key: str, model: str, calm_seconds: Mapping[str, float] | None = None) -> Observed:
        """What is seen of one ModelDeployment.

        Args:
            key: ``namespace/name``.
            model: its OpenAI model id, for demand.
            calm_seconds: by variant.
        """
        tree: dict[str, dict[str, list[Heartbeat]]] = {}
        for name in self._applications_of.get(key, ()):
            _branch(tree, name)
        for endpoint in self._endpoints_of.get(key, ()):
            _branch(tree, endpoint.application).append(endpoint)
        namespace, _, deployment = key.partition("/")
        return Observed(
            variants={
                variant: {
                    revision: Revision(
                        self.applications.get(f"{namespace}.{deployment}.{variant}.{revision}"),
                        tuple(found),
                    )
                    for revision, found in revisions.items()
                }
                for variant, revisions in tree.items()
            },
            demand=self._demand_of.get(model, {}),
            blind=self.blind,
            calm_seconds=calm_seconds or {},
        )

    def ready(self, key: str) -> bool:
        """Whether a replica of a ModelDeployment answers requests."""
        return any(e.state == EndpointState.READY for e in self._endpoints_of.get(key, ()))

    def keys(self) -> set[str]:
        """ModelDeployments that anything is seen of."""
        return self._applications_of.keys() | self._endpoints_of.keys()

    def applications_of(self, key: str) -> Mapping[str, ApplicationState]:
        """Applications of one ModelDeployment, those that are being removed, too."""
        return self._applications_of.get(key, {})

    @property
    def foreign(self) -> list[ApplicationState]:
        """Applications that are not ours: left as they are."""
        return [state for name, state in self.applications.items() if _key_of(name) is None]


@lru_cache(maxsize=65536)
def _key_of(application: str) -> str | None:
    identity = parse_application_name(application)
    return f"{identity.namespace}/{identity.deployment}" if identity else None


def _branch(tree: dict[str, dict[str, list[Heartbeat]]], application: str) -> list[Heartbeat]:
    identity = parse_application_name(application)
    assert identity is not None  # noqa: S101  only parsed names have a key
    return tree.setdefault(identity.variant, {}).setdefault(identity.revision, [])


def _shape(endpoints: Iterable[Heartbeat]) -> list[tuple[object, ...]]:
    """What a reconcile step reads of heartbeats."""
    return [
        (
            e.id,
            e.application,
            e.state,
            e.capacity,
            e.memory,
            e.accelerator,
            e.restarts,
            e.reason,
            e.message,
            e.adapters,
            e.adapter_problems,
        )
        for e in endpoints
    ]
