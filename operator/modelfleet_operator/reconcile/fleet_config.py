"""The whole set of applications that Ray Serve shall run, kept from step to step.

Serve's PUT takes the whole set and removes what it lacks. Each application is encoded once, when it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from modelfleet_operator.reconcile.applications import Application, ApplicationState
from modelfleet_operator.reconcile.observed import PoolSight


@dataclass(frozen=True)
class Difference:
    """What a PUT would change."""

    set: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.set or self.removed)


@dataclass
class FleetConfig:
    """Wanted applications by the ModelDeployment that they are of.

    Attributes:
        held: ModelDeployments whose applications are left as they run: nothing can be decided for them.
    """

    held: set[str] = field(default_factory=set)
    _wanted: dict[str, dict[str, Application]] = field(default_factory=dict)
    _extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    _encoded: dict[str, bytes] = field(default_factory=dict)

    def add_extra(self, config: Mapping[str, Any]) -> None:
        """An application that is no ModelDeployment's: the registry."""
        self._extra[config["name"]] = dict(config)
        self._encoded[config["name"]] = msgspec.json.encode(config)

    def want(self, key: str, applications: Iterable[Application]) -> None:
        """Replace what a ModelDeployment shall run."""
        before = self._wanted.get(key, {})
        now = {application.name: application for application in applications}
        for name in before.keys() - now.keys():
            self._encoded.pop(name, None)
        for name, application in now.items():
            if before.get(name) != application or name not in self._encoded:
                self._encoded[name] = msgspec.json.encode(application.config())
        self._wanted[key] = now

    def forget(self, key: str) -> None:
        """A ModelDeployment is gone: its applications shall go."""
        for name in self._wanted.pop(key, {}):
            self._encoded.pop(name, None)

    def difference(self, sight: PoolSight, keys: Iterable[str]) -> Difference:
        """What a PUT would change for these ModelDeployments, and for the registry."""
        changed = {
            name for name, config in self._extra.items() if not runs_as(sight.applications.get(name), config)
        }
        gone: set[str] = set()
        for key in keys:
            if key in self.held:
                continue
            wanted = self._wanted.get(key, {})
            running = sight.applications_of(key)
            changed |= {name for name, app in wanted.items() if not runs_as(running.get(name), app.config())}
            gone |= {name for name, app in running.items() if name not in wanted and not app.deleting}
        # Serve can't start an application under a name that it is still removing.
        return Difference(frozenset(changed - _deleting(sight, changed)), frozenset(gone))

    def strays(self, sight: PoolSight) -> set[str]:
        """ModelDeployments that run without being wanted here."""
        return sight.keys() - self._wanted.keys() - self.held

    def body(self, sight: PoolSight) -> list[bytes]:
        """Every application for a PUT: ours, those held back, and those of others as Serve reports them."""
        kept = [a for a in sight.foreign if a.name not in self._extra]
        kept += [a for key in self.held for a in sight.applications_of(key).values()]
        blocked = _deleting(sight, self._encoded)
        ours = [content for name, content in self._encoded.items() if name not in blocked]
        return ours + [msgspec.json.encode(a.config) for a in kept if a.config and not a.deleting]


def _deleting(sight: PoolSight, names: Iterable[str]) -> set[str]:
    return {name for name in names if (app := sight.applications.get(name)) is not None and app.deleting}


def runs_as(state: ApplicationState | None, config: Mapping[str, Any]) -> bool:
    """Whether Serve already has this configuration; it may report more fields than were sent."""
    return state is not None and not state.deleting and _covers(state.config, config)


def _covers(actual: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(actual, Mapping) and all(
            (value is None and key not in actual) or _covers(actual.get(key), value)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(actual, list) and len(actual) == len(wanted) and all(map(_covers, actual, wanted))
    return bool(actual == wanted)
