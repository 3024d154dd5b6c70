"""Endpoints: the newest heartbeat of each replica, and for how long it counts. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from modelfleet_serving.contract import (
    ApplicationId,
    Endpoint,
    EndpointState,
    Heartbeat,
    parse_application_name,
)
from modelfleet_serving.registry.incidents import Incidents
from modelfleet_serving.registry.keys import DeploymentKey

REMEMBER_GONE_SECONDS: Final = 60.0
"""A heartbeat may be under way for as long as its sender's time-outs allow, which is less."""


class UnknownApplicationError(ValueError):
    """A heartbeat that names no application of ours."""


class TooManyError(Exception):
    """A bound is reached; try again later."""


@dataclass
class _Entry:
    heartbeat: Heartbeat
    application: ApplicationId
    expires: float


@dataclass(frozen=True)
class Change:
    """What a heartbeat changed."""

    deployments: frozenset[DeploymentKey] = frozenset()
    """Their routes may have other endpoints now."""
    visible: bool = False
    """Something that the operator looks at is different."""
    rediscovered: bool = False
    """A replica that has been there before and that we didn't know: we are the one that is new."""


class Endpoints:
    """Heartbeats by replica.

    Args:
        limit: replicas that are kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.incidents = Incidents()
        self._limit = limit
        self._entries: dict[str, _Entry] = {}
        self._by_deployment: dict[DeploymentKey, set[str]] = {}
        self._by_url: dict[str, str] = {}
        self._gone: dict[str, tuple[int, float]] = {}
        """Sequence of the last heartbeat of replicas that left, until when that is kept."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Heartbeat]:
        return (entry.heartbeat for entry in self._entries.values())

    def beat(self, heartbeat: Heartbeat, expires: float) -> Change:
        """Take in a heartbeat; one that is older than what is known changes nothing.

        Raises:
            UnknownApplicationError: it belongs to no application.
            TooManyError: there are as many replicas as may be.
        """
        application = parse_application_name(heartbeat.application)
        if application is None:
            raise UnknownApplicationError(f"{heartbeat.application!r} is not the name of an application")
        known = self._entries.get(heartbeat.id)
        last = known.heartbeat.sequence if known else self._gone.get(heartbeat.id, (-1, 0.0))[0]
        if heartbeat.sequence <= last:
            return Change()
        if heartbeat.gone:
            self._gone[heartbeat.id] = (heartbeat.sequence, expires + REMEMBER_GONE_SECONDS)
            return self._drop([heartbeat.id])
        if known is None and len(self._entries) >= self._limit:
            raise TooManyError(f"{self._limit} replicas are registered")
        ousted = self._oust(heartbeat)
        before = known.heartbeat if known else None
        if before and (before.application, before.url) != (heartbeat.application, heartbeat.url):
            moved = self._drop([heartbeat.id])
            ousted = Change(deployments=ousted.deployments | moved.deployments, visible=True)
        self._entries[heartbeat.id] = _Entry(heartbeat, application, expires)
        key = (application.namespace, application.deployment)
        self._by_deployment.setdefault(key, set()).add(heartbeat.id)
        if heartbeat.url:
            self._by_url[heartbeat.url] = heartbeat.id
        self.incidents.heard(application, before, heartbeat)
        routed = before is None or _routing(before) != _routing(heartbeat)
        return Change(
            deployments=ousted.deployments | ({key} if routed else frozenset()),
            visible=routed or ousted.visible or _shown(before) != _shown(heartbeat),
            rediscovered=known is None and heartbeat.sequence > 1,
        )

    def expire(self, now: float) -> Change:
        """Drop replicas whose lease is over."""
        self._gone = {key: value for key, value in self._gone.items() if value[1] > now}
        late = [key for key, entry in self._entries.items() if entry.expires <= now]
        return self._lose(late) if late else Change()

    def shorten(self, name: str, expires: float) -> None:
        """A replica has to be heard of earlier than its lease says."""
        if (entry := self._entries.get(name)) is not None:
            entry.expires = min(entry.expires, expires)

    def extend(self, seconds: float) -> None:
        """Prolong all leases: for so long nobody could have been heard."""
        for entry in self._entries.values():
            entry.expires += seconds

    def of(self, key: DeploymentKey) -> dict[tuple[str, str], list[Endpoint]]:
        """A deployment's endpoints that have an address, by variant and revision, in a stable order."""
        found: dict[tuple[str, str], list[Endpoint]] = {}
        for name in sorted(self._by_deployment.get(key, ())):
            entry = self._entries[name]
            beat = entry.heartbeat
            if not beat.url:
                continue
            endpoint = Endpoint(
                id=beat.id,
                url=beat.url,
                state=beat.state,
                revision=entry.application.revision,
                capacity=beat.capacity,
                adapters=beat.adapters,
            )
            found.setdefault((entry.application.variant, entry.application.revision), []).append(endpoint)
        return found

    def variants(self, key: DeploymentKey) -> set[str]:
        """A deployment's variants that have replicas."""
        return {self._entries[name].application.variant for name in self._by_deployment.get(key, ())}

    def count(self) -> dict[EndpointState, int]:
        """Replicas by state."""
        counts = dict.fromkeys(EndpointState, 0)
        for entry in self._entries.values():
            counts[entry.heartbeat.state] += 1
        return counts

    def _oust(self, heartbeat: Heartbeat) -> Change:
        """Whoever had this address before has it no longer, even if nobody told us of its end."""
        previous = self._by_url.get(heartbeat.url) if heartbeat.url else None
        if previous is None or previous == heartbeat.id or previous not in self._entries:
            return Change()
        if self._entries[previous].heartbeat.url != heartbeat.url:
            return Change()
        return self._lose([previous])

    def _lose(self, names: list[str]) -> Change:
        """Drop replicas that didn't say goodbye."""
        for name in names:
            entry = self._entries[name]
            self.incidents.lost(entry.application, entry.heartbeat)
        return self._drop(names)

    def _drop(self, names: list[str]) -> Change:
        keys: set[DeploymentKey] = set()
        for name in names:
            entry = self._entries.pop(name, None)
            if entry is None:
                continue
            key = (entry.application.namespace, entry.application.deployment)
            keys.add(key)
            members = self._by_deployment[key]
            members.discard(name)
            if not members:
                del self._by_deployment[key]
            if self._by_url.get(entry.heartbeat.url) == name:
                del self._by_url[entry.heartbeat.url]
        return Change(deployments=frozenset(keys), visible=bool(keys))


def _routing(beat: Heartbeat) -> tuple[object, ...]:
    """What routers see of a replica."""
    return beat.application, beat.url, beat.state, beat.capacity, beat.adapters


def _shown(beat: Heartbeat | None) -> tuple[object, ...] | None:
    """What the operator decides by, without the load, which always changes."""
    if beat is None:
        return None
    return (
        beat.memory,
        beat.restarts,
        beat.reason,
        beat.message,
        beat.model,
        beat.node,
        beat.adapter_problems,
    )
