"""Waits until nothing of a deleted ModelDeployment is left, then takes its finalizer off.

The wait has an end, whatever Ray and the registry do: a ModelDeployment must never hold a namespace up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from modelfleet_operator.api import duration_seconds
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, Object
from modelfleet_operator.pools import PoolRunner, Tools
from modelfleet_operator.seen import SeenDeployment, address_of
from modelfleet_operator.settings import Settings

log = logging.getLogger(__name__)

LEAVE_POLL_SECONDS: Final = 0.5
DEFAULT_DRAIN: Final = "600s"


async def leave(
    key: str, entry: SeenDeployment, tools: Tools, runners: Callable[[], Sequence[PoolRunner]]
) -> None:
    """Let a withdrawn ModelDeployment go once it has drained, or once it is not waited for any longer.

    Args:
        key: its ``namespace/name``.
        entry: the ModelDeployment; its ``gone`` ends the wait.
        tools: the writer that releases it, and how long to wait.
        runners: the pools at work now.
    """
    waited = time.monotonic()
    deadline = waited + _patience(entry, tools.settings)
    while not entry.gone.is_set():
        why = _reason_to_let_go(entry, runners(), tools.settings, waited, deadline)
        if why:
            log.warning("%s is let go: %s", key, why)
            break
        try:
            await asyncio.wait_for(entry.gone.wait(), LEAVE_POLL_SECONDS)
        except TimeoutError:
            continue
    if entry.runner is not None and entry.runner in runners():
        # Else whoever deletes the pool next is told that this one still uses it.
        await entry.runner.leave_told(key)
    await tools.writer.release(address_of(MODEL_DEPLOYMENT, key))


def _reason_to_let_go(
    entry: SeenDeployment, runners: Sequence[PoolRunner], settings: Settings, since: float, deadline: float
) -> str:
    """Why a ModelDeployment is not waited for any longer; empty while it is."""
    runner = entry.runner
    if runner is None or runner not in runners:
        return "its pool is not there"
    lost = min(runner.lost_seconds(), time.monotonic() - since)
    if lost >= settings.let_go_seconds:
        return f"Ray or the registry of pool {runner.pool.key} has been away for {lost:.0f} s"
    if time.monotonic() > deadline:
        return "it did not drain in time"
    return ""


def _patience(entry: SeenDeployment, settings: Settings) -> float:
    """Seconds that are left to drain in; never more than the whole time, whatever the clocks say."""
    rollout = entry.body.get("spec", {}).get("rollout", {})
    drain = duration_seconds(str(rollout.get("drainTimeout", DEFAULT_DRAIN))) + settings.drain_margin_seconds
    return min(_deletion_time(entry.body) + drain - datetime.now(UTC).timestamp(), drain)


def _deletion_time(body: Object) -> float:
    return datetime.fromisoformat(body["metadata"]["deletionTimestamp"]).timestamp()
