"""Names that clients ask for belong to one ModelDeployment of a pool: the oldest that claims them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from modelfleet_operator.api import ModelDeployment


def names_of(deployment: ModelDeployment) -> tuple[str, ...]:
    """The model's name and those of its adapters."""
    return (deployment.model_name, *(a.name for a in deployment.spec.adapters))


def seniority(deployment: ModelDeployment) -> tuple[str, str]:
    """Sorts the oldest first; the key decides between twins."""
    # RFC 3339 in UTC with fixed width sorts as text; one without a time is from a file and has no rivals.
    return (deployment.metadata.creation_timestamp or "", deployment.key)


@dataclass
class Claims:
    """Who claims which name in one pool; answers only where a change made a difference."""

    _claimants: dict[str, dict[str, ModelDeployment]] = field(default_factory=dict)
    _names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, deployment: ModelDeployment) -> set[str]:
        """Take a ModelDeployment in; the keys whose answer may have changed, its own included."""
        affected = self.remove(deployment.key)
        names = names_of(deployment)
        self._names[deployment.key] = names
        for name in names:
            rivals = self._claimants.setdefault(name, {})
            rivals[deployment.key] = deployment
            affected.update(rivals)
        return affected

    def remove(self, key: str) -> set[str]:
        """Take a ModelDeployment out; the keys of its rivals."""
        affected: set[str] = set()
        for name in self._names.pop(key, ()):
            rivals = self._claimants[name]
            rivals.pop(key, None)
            affected.update(rivals)
            if not rivals:
                del self._claimants[name]
        return affected

    def conflicts(self, key: str) -> Mapping[str, str]:
        """Names that an older ModelDeployment holds, with its key."""
        held = {name: self._holder(self._claimants[name].values()) for name in self._names.get(key, ())}
        return {name: holder for name, holder in held.items() if holder != key}

    @staticmethod
    def _holder(rivals: Iterable[ModelDeployment]) -> str:
        return min(rivals, key=seniority).key
