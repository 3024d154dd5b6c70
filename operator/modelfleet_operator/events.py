"""Kubernetes Events: one for each condition that turns, and for nothing else."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from modelfleet_operator.api import Condition
from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.kube import EVENT, Kind, KubeClient
from modelfleet_operator.metrics import ERRORS

log = logging.getLogger(__name__)

CONTROLLER: Final = "modelfleet.io/operator"
QUEUED: Final = 10_000
_POSTERS: Final = 1
"""Few: statuses go before the news of them."""
_NOTE_LENGTH: Final = 1024
"""Longest note that the API takes."""
_QUIET: Final = frozenset({"Progressing"})
"""Conditions whose turns are told by others: a rollout begins with a change by the user and ends Ready."""
_VERDICTS: Final = frozenset({"Accepted", "Fits"})
"""Conditions that are never false only because something has yet to start."""
_UNDER_WAY: Final = frozenset(
    {"Deploying", "Starting", "Pending", "Updating", "RollingOut", "Unknown", "ClusterStarting", "Deleting"}
)
"""Reasons of what is not ready and need not worry anybody."""
_ON_PURPOSE: Final = frozenset({"Suspended"})
"""Reasons of what somebody asked for."""


@dataclass
class EventWriter:
    """Posts events in the background; when too many wait, the newest are left out, never a reconcile step.

    Attributes:
        kube: the API server.
        identity: of this process.
    """

    kube: KubeClient
    identity: str
    _queue: asyncio.Queue[dict[str, Any]] = field(default_factory=lambda: asyncio.Queue(QUEUED))

    def tell(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str,
        before: Sequence[Condition],
        after: Sequence[Condition],
    ) -> None:
        """Tell which conditions turned."""
        for condition in turned(before, after):
            body = {
                "metadata": {"namespace": namespace, "name": f"{name}.{secrets.token_hex(6)}"},
                "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                "reportingController": CONTROLLER,
                "reportingInstance": self.identity[:128],
                "type": event_type(condition),
                "reason": condition.reason,
                "action": f"Set{condition.type}",
                "note": f"{condition.type}={condition.status}: {condition.message}"[:_NOTE_LENGTH],
                "regarding": {
                    "apiVersion": kind.api_version,
                    "kind": kind.kind,
                    "namespace": namespace,
                    "name": name,
                    "uid": uid,
                },
            }
            try:
                self._queue.put_nowait(body)
            except asyncio.QueueFull:
                ERRORS.labels(reason="EventDropped").inc()

    async def run(self) -> None:
        """Post until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(_POSTERS):
                group.create_task(self._post(), name=f"post-events-{number}")

    async def _post(self) -> None:
        while True:
            body = await self._queue.get()
            try:
                await self.kube.create(EVENT, body)
            except ClientError as error:  # events are for people: nothing waits for them
                ERRORS.labels(reason="EventLost").inc()
                log.info("event not written: %s", error)


def event_type(condition: Condition) -> str:
    """``Warning`` for what is lost, ``Normal`` for what is reached or asked for."""
    return "Normal" if condition.status == "True" or condition.reason in _ON_PURPOSE else "Warning"


def turned(before: Sequence[Condition], after: Sequence[Condition]) -> Iterator[Condition]:
    """Conditions that turned in a way that people want to know of.

    What has not been reached yet while something starts is no event; what is lost, or can never be, is.
    """
    old = {c.type: c for c in before}
    sound = all(c.status == "True" for c in after if c.type in _VERDICTS)
    for condition in after:
        was = old.get(condition.type)
        if sound and _failed(condition) and (was is None or was.reason != condition.reason):
            # It may never have worked: then no condition turns.
            yield condition
            continue
        if condition.type in _QUIET or (was is not None and was.status == condition.status):
            continue
        verdict = condition.type in _VERDICTS
        held = was is not None and was.status == "True" and was.reason not in _ON_PURPOSE
        bad = condition.status == "False" and (verdict or (held and condition.type != "Suspended"))
        again = verdict and was is not None and was.status == "False"
        if bad or (condition.status == "True" and (condition.type == "Ready" or again)):
            yield condition


def _failed(condition: Condition) -> bool:
    return condition.type == "Ready" and condition.status == "False" and condition.reason not in _UNDER_WAY
