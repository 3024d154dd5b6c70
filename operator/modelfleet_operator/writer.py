"""Writes finalizers, statuses and events to the API server: the latest alone, only when it differs.

Handlers and controllers say what shall stand there and go on; a few workers see to it. What fails is tried
again with growing pauses, and what was overtaken by something newer is never written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from modelfleet_operator.api import FINALIZER, Condition
from modelfleet_operator.clients.errors import ClientError, UnavailableError
from modelfleet_operator.clients.kube import (
    ConflictError,
    ForbiddenError,
    Kind,
    KubeClient,
    NotFoundError,
    Object,
)
from modelfleet_operator.events import EventWriter
from modelfleet_operator.metrics import ERRORS, STATUS_QUEUE, STATUS_WRITES

log = logging.getLogger(__name__)

WORKERS: Final = 16
FIRST_RETRY_SECONDS: Final = 0.5
LAST_RETRY_SECONDS: Final = 30.0

Address = tuple[Kind, str, str]
"""Kind, namespace, name."""
Compose = Callable[[str, dict[str, Any]], dict[str, Any]]
"""The status that shall stand there, of the time (RFC 3339) and the status that stands there now."""


def now_text() -> str:
    """The time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class _Target:
    """One object as it was last seen or written."""

    uid: str
    has_finalizer: bool
    status: dict[str, Any]
    deleting: bool
    compose: Compose | None = None
    failures: int = 0


@dataclass
class ObjectWriter:
    """One for all objects.

    Attributes:
        kube: the API server.
        events: where transitions of conditions are told.
    """

    kube: KubeClient
    events: EventWriter
    _targets: dict[Address, _Target] = field(default_factory=dict)
    _queue: asyncio.Queue[Address] = field(default_factory=asyncio.Queue)
    _queued: set[Address] = field(default_factory=set)
    _timers: set[asyncio.TimerHandle] = field(default_factory=set)

    def saw(self, kind: Kind, body: Object, *, authoritative: bool = False) -> None:
        """Take an object in as it stands in the API.

        Args:
            kind: of the object.
            body: the object.
            authoritative: it was read just now; otherwise an event, which may be older than our last write.
        """
        metadata = body["metadata"]
        address = (kind, metadata["namespace"], metadata["name"])
        target = self._targets.get(address)
        if target is None or target.uid != metadata["uid"]:
            status = body.get("status") or {}
            self._targets[address] = target = _Target(metadata["uid"], False, status, False)
        elif authoritative and address not in self._queued:
            target.status = body.get("status") or {}
        target.deleting = "deletionTimestamp" in metadata
        target.has_finalizer = FINALIZER in metadata.get("finalizers", ())
        if not target.deleting and (not target.has_finalizer or authoritative):
            self._enqueue(address)

    def status_of(self, address: Address) -> dict[str, Any]:
        """The status as it was last seen or written."""
        target = self._targets.get(address)
        return target.status if target else {}

    def set_status(self, address: Address, compose: Compose) -> None:
        """Let a status stand there; it is put together when it is written."""
        target = self._targets.get(address)
        if target is not None:
            target.compose = compose
            self._enqueue(address)

    def forget(self, address: Address) -> None:
        """The object is gone."""
        self._targets.pop(address, None)

    async def release(self, address: Address) -> None:
        """Take our finalizer off an object, however often that needs to be tried."""
        kind, namespace, name = address
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                body = await self.kube.get(kind, namespace, name)
                metadata = body["metadata"]
                if FINALIZER not in metadata.get("finalizers", ()) or "deletionTimestamp" not in metadata:
                    return
                rest = [f for f in metadata["finalizers"] if f != FINALIZER]
                await self.kube.set_finalizers(kind, namespace, name, rest, metadata["resourceVersion"])
            except NotFoundError:
                return
            except ConflictError:
                continue
            except ClientError as error:
                ERRORS.labels(reason="ApiServer").inc()
                log.warning("finalizer of %s/%s: %s", namespace, name, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_RETRY_SECONDS)
            else:
                return

    async def run(self) -> None:
        """Write until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(WORKERS):
                    group.create_task(self._work(), name=f"write-objects-{number}")
        finally:
            for timer in self._timers:
                timer.cancel()

    def _enqueue(self, address: Address) -> None:
        if address not in self._queued:
            self._queued.add(address)
            self._queue.put_nowait(address)  # bounded by the number of objects: each stands in it once
            STATUS_QUEUE.set(self._queue.qsize())

    async def _work(self) -> None:
        while True:
            address = await self._queue.get()
            STATUS_QUEUE.set(self._queue.qsize())
            self._queued.discard(address)
            target = self._targets.get(address)
            if target is None:
                continue
            try:
                await self._write(address, target)
            except UnavailableError as error:
                self._retry(address, target, error)
            except NotFoundError:
                pass  # deleted meanwhile; its event comes
            except ForbiddenError as error:
                # A namespace that is being deleted takes nothing new.
                ERRORS.labels(reason="ApiForbidden").inc()
                log.warning("%s", error)
            except ClientError as error:
                ERRORS.labels(reason="ApiRefused").inc()
                log.error("%s", error)  # noqa: TRY400  the message says it all
            else:
                target.failures = 0

    def _retry(self, address: Address, target: _Target, error: UnavailableError) -> None:
        ERRORS.labels(reason="ApiServer").inc()
        pause = min(FIRST_RETRY_SECONDS * 2**target.failures, LAST_RETRY_SECONDS)
        target.failures += 1
        log.info("%s; again in %.1f s", error, pause)
        loop = asyncio.get_running_loop()

        def again() -> None:
            self._timers.discard(timer)
            self._enqueue(address)

        timer = loop.call_later(pause, again)
        self._timers.add(timer)

    async def _write(self, address: Address, target: _Target) -> None:
        kind, namespace, name = address
        # The uid keeps an apply from bringing a deleted object back.
        metadata = {"namespace": namespace, "name": name, "uid": target.uid}
        if not target.has_finalizer and not target.deleting:
            await self.kube.apply(kind, {"metadata": {**metadata, "finalizers": [FINALIZER]}})
            target.has_finalizer = True
        if target.compose is None:
            return
        before, after = target.status, target.compose(now_text(), target.status)
        if after == before:
            return
        await self.kube.apply_status(kind, metadata, after)
        target.status = after
        STATUS_WRITES.inc()
        if not target.deleting:
            self.events.tell(kind, namespace, name, target.uid, _conditions(before), _conditions(after))


def _conditions(status: dict[str, Any]) -> list[Condition]:
    return [Condition.model_validate(c) for c in status.get("conditions", ())]
