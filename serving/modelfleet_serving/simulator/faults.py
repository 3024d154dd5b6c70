"""Faults to order: given at the start, or changed in a running simulator by ``POST /simulator/faults``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Status = Annotated[int, msgspec.Meta(ge=100, le=599)]


class Faults(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What goes wrong. Shares are drawn from the simulator's seed, so a run can be repeated."""

    error_rate: Share = 0.0
    """Share of requests that are refused with ``errorStatus``."""
    error_status: Status = 500
    reset_rate: Share = 0.0
    """Share of requests whose connection breaks: before the answer, or after ``resetAfterTokens``."""
    reset_after_tokens: Count | None = None
    stall_rate: Share = 0.0
    """Share of requests that go silent: in the prefill, or after ``stallAfterTokens``. They keep their
    place in the batch until the client goes away."""
    stall_after_tokens: Count = 0
    die_after_requests: Count | None = None
    """The process ends, with status 1 and no farewell, when it gets one request more."""
    die_after_tokens: Count | None = None
    """The same after so many generated tokens in all, in the middle of its streams."""
    delay_seconds: Seconds = 0.0
    """Added before a request enters the queue."""
    slowdown: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    """Factor on the time of every step."""
    health_status: Status = 200
    """What ``/health`` says, true or not."""
    health_hangs: bool = False
    """``/health`` accepts and never answers."""
    drain_status: Status = 503
    """What a new request gets while it drains; vLLM says 500."""


@dataclass(frozen=True)
class Fate:
    """What was drawn for one request."""

    error_status: int | None = None
    reset_after: int | None = None
    stall_after: int | None = None
    delay: float = 0.0


def draw(faults: Faults, rng: random.Random) -> Fate:
    """One request's fate. Draws as often whatever the faults are, so that changing one keeps the rest."""
    error, reset, stall = rng.random(), rng.random(), rng.random()
    return Fate(
        error_status=faults.error_status if error < faults.error_rate else None,
        reset_after=(faults.reset_after_tokens or 0) if reset < faults.reset_rate else None,
        stall_after=faults.stall_after_tokens if stall < faults.stall_rate else None,
        delay=faults.delay_seconds,
    )


def changed(faults: Faults, changes: dict[str, Any]) -> Faults:
    """``faults`` with the fields of a JSON object replaced.

    Raises:
        ValueError: for a field that doesn't exist or a value out of range; the message names it.
    """
    fields = msgspec.to_builtins(faults)
    unknown = changes.keys() - fields.keys()
    if unknown:
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(fields)}")
    try:
        return msgspec.convert({**fields, **changes}, Faults)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
