"""What was last seen of a ModelDeployment or a ServingPool, and whether something newer differs from it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from modelfleet_operator.api import ModelDeployment, ServingPool
from modelfleet_operator.clients.kube import Kind, Object
from modelfleet_operator.pools import PoolRunner
from modelfleet_operator.reports import Report
from modelfleet_operator.writer import Address


@dataclass
class SeenDeployment:
    """One ModelDeployment as it was last seen.

    Attributes:
        body: the object.
        parsed: its last valid state; ``None`` where there was none yet.
        problems: why ``body`` can't be understood; empty where it can.
        runner: the pool at work that it is given to.
        former: pools that it moved out of and that still serve it, by ``namespace/name``.
        told: what its pool's controller said last.
        draining: pools that something of it is left in, from its deletion on.
        gone: set once nothing of it is left in any pool.
        leaving: waits for that, from its deletion on.
        at: monotonic time at which it was seen.
    """

    body: Object
    parsed: ModelDeployment | None
    problems: str = ""
    runner: PoolRunner | None = None
    former: dict[str, PoolRunner] = field(default_factory=dict)
    told: Report | None = None
    draining: set[str] = field(default_factory=set)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Task[None] | None = None
    at: float = field(default_factory=time.monotonic)

    def take(self, body: Object) -> None:
        """Take a newer state over."""
        self.body, self.at = body, time.monotonic()

    @property
    def pool_name(self) -> str:
        """Name of the ServingPool that it asks for."""
        return str(self.body.get("spec", {}).get("pool", "default"))

    @property
    def served_by(self) -> str:
        """The pool that served it when its status was written, as ``namespace/name``."""
        return str(self.body.get("status", {}).get("pool") or "")

    @property
    def namespace(self) -> str:
        """Where it is."""
        return str(self.body["metadata"]["namespace"])

    @property
    def deleting(self) -> bool:
        """Whether somebody deleted it."""
        return "deletionTimestamp" in self.body["metadata"]


@dataclass
class SeenPool:
    """One ServingPool as it was last seen.

    Attributes:
        body: the object.
        parsed: its last valid state; ``None`` where there was none yet.
        problems: why it is not accepted; empty where it is.
        runner: what works on it; ``None`` where it is not accepted.
        releasing: takes its finalizer off.
        at: monotonic time at which it was seen.
    """

    body: Object
    parsed: ServingPool | None
    problems: str = ""
    runner: PoolRunner | None = None
    releasing: asyncio.Task[None] | None = None
    at: float = field(default_factory=time.monotonic)

    def take(self, body: Object) -> None:
        """Take a newer state over."""
        self.body, self.at = body, time.monotonic()

    @property
    def deleting(self) -> bool:
        """Whether somebody deleted it."""
        return "deletionTimestamp" in self.body["metadata"]


def key_of(body: Object) -> str:
    """``namespace/name`` of an object."""
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


def address_of(kind: Kind, key: str) -> Address:
    """What the writer calls the object with this ``namespace/name``."""
    namespace, _, name = key.partition("/")
    return (kind, namespace, name)


def is_older(body: Object, known: Object) -> bool:
    """Whether a list or a watch gave an older state than what is known already."""
    new, old = body["metadata"]["resourceVersion"], known["metadata"]["resourceVersion"]
    # Versions of one resource compare as numbers since Kubernetes 1.35; other servers' ones do not count.
    return str(new).isdigit() and str(old).isdigit() and int(new) < int(old)


def is_stale(body: Object, known: SeenDeployment | SeenPool, listed: float | None) -> bool:
    """Whether something newer is known: of an event by its version, of a list by when it began.

    A list also counts where versions went back, as they do when an etcd is restored.
    """
    return is_older(body, known.body) if listed is None else known.at >= listed


def is_same(body: Object, known: Object) -> bool:
    """Whether nothing changed that a user or an engine's measurement could change."""
    return (
        body["metadata"].get("generation") == known["metadata"].get("generation")
        and body["metadata"].get("deletionTimestamp") == known["metadata"].get("deletionTimestamp")
        and _measured(body) == _measured(known)
    )


def _measured(body: Object) -> dict[str, Any]:
    """Measurements by variant; a status without any says no more than no status."""
    rows = body.get("status", {}).get("variants", ())
    return {row["name"]: found for row in rows if (found := row.get("measurements"))}
