"""Writes finalizers, statuses and events to the API server: the latest alone, only when it differs.

Handlers and controllers say what shall stand there and go on; a few workers see to it. What fails is tried
again with growing pauses, and what was overtaken by something newer is never written: when much waits, states
that something newer will follow soon go last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
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
    passing: bool = False
    """Whether something newer than ``compose`` is bound to follow."""
    writing: bool = False
    again: bool = False
    """Whether it came up once more while it was being written: two writes at once could end in any order."""
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
    _queue: asyncio.PriorityQueue[tuple[bool, int, Address]] = field(default_factory=asyncio.PriorityQueue)
    _queued: dict[Address, bool] = field(default_factory=dict)
    """Whether each object that waits does so behind all others."""
    _numbers: Iterator[int] = field(default_factory=count)
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

    def set_status(self, address: Address, compose: Compose, *, passing: bool = False) -> None:
        """Let a status stand there; it is put together when it is written.

        Args:
            address: the object.
            compose: its status.
            passing: another status is bound to follow: all others go first.
        """
        target = self._targets.get(address)
        if target is not None:
            target.compose, target.passing = compose, passing
            self._enqueue(address, last=passing)

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

    def _enqueue(self, address: Address, *, last: bool = False) -> None:
        if self._queued.get(address, True) and self._queued.get(address) != last:
            self._queued[address] = last
            # Bounded by the number of objects: each stands in it once at each end.
            self._queue.put_nowait((last, next(self._numbers), address))
            STATUS_QUEUE.set(len(self._queued))

    async def _work(self) -> None:
        while True:
            last, _, address = await self._queue.get()
            if self._queued.get(address) != last:
                continue  # it was moved forward
            del self._queued[address]
            STATUS_QUEUE.set(len(self._queued))
            target = self._targets.get(address)
            if target is None:
                continue
            if target.writing:
                target.again = True
                continue
            target.writing = True
            try:
                await self._try_to_write(address, target, last=last)
            finally:
                target.writing = False
            if target.again:
                target.again = False
                self._enqueue(address, last=target.passing)

    async def _try_to_write(self, address: Address, target: _Target, *, last: bool) -> None:
        try:
            await self._write(address, target, last=last)
        except UnavailableError as error:
            self._retry(address, target, error, "ApiServer")
        except NotFoundError:
            pass  # deleted meanwhile; its event comes
        except ForbiddenError as error:
            # An API server that starts knows no roles for a moment. A namespace that is being deleted takes
            # nothing new either, until the object's own end is seen.
            self._retry(address, target, error, "ApiForbidden")
        except ClientError as error:
            ERRORS.labels(reason="ApiRefused").inc()
            log.error("%s", error)  # noqa: TRY400  the message says it all
        except Exception:  # a status that can't be composed must not end the writing of all others
            ERRORS.labels(reason="InternalError").inc()
            log.exception("status of %s/%s", address[1], address[2])
        else:
            target.failures = 0

    def _retry(self, address: Address, target: _Target, error: ClientError, reason: str) -> None:
        ERRORS.labels(reason=reason).inc()
        pause = min(FIRST_RETRY_SECONDS * 2**target.failures, LAST_RETRY_SECONDS)
        target.failures += 1
        log.info("%s; again in %.1f s", error, pause)
        loop = asyncio.get_running_loop()

        def again() -> None:
            self._timers.discard(timer)
            self._enqueue(address)

        timer = loop.call_later(pause, again)
        self._timers.add(timer)

    async def _write(self, address: Address, target: _Target, *, last: bool) -> None:
        kind, namespace, name = address
        # The uid keeps an apply from bringing a deleted object back.
        metadata = {"namespace": namespace, "name": name, "uid": target.uid}
        if not target.has_finalizer and not target.deleting:
            await self.kube.apply(kind, {"metadata": {**metadata, "finalizers": [FINALIZER]}})
            target.has_finalizer = True
        if target.compose is None:
            return
        if target.passing and not last:
            self._enqueue(address, last=True)
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
