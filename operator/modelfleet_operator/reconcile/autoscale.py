"""How many replicas a variant shall have."""

from __future__ import annotations

import math
from typing import Final

from modelfleet_operator.api import ReplicaBounds
from modelfleet_serving.contract import ModelDemand

DEFAULT_TARGET: Final = 32
"""Requests at once for one replica where the engine does not say how many it runs."""
TARGET_SHARE: Final = 0.75
"""Share of an engine's capacity that is planned with: the rest takes what comes while a replica starts."""
SCALE_DOWN_SECONDS: Final = 300.0
"""For so long fewer replicas must have been enough."""


def needed_replicas(bounds: ReplicaBounds, demand: ModelDemand | None, capacity: int | None) -> int:
    """Replicas that the demand needs, within the bounds.

    Args:
        bounds: of the variant.
        demand: requests in flight and in the queue; ``requests`` are those of the last minute.
        capacity: requests that one replica runs at once.
    """
    if demand is None:
        return bounds.min
    target = max(1.0, (capacity or DEFAULT_TARGET) * TARGET_SHARE)
    need = math.ceil((demand.in_flight + demand.queued) / target)
    if demand.requests:
        need = max(need, 1)
    return min(max(need, bounds.min), bounds.upper)


def wanted_replicas(
    bounds: ReplicaBounds, demand: ModelDemand | None, capacity: int | None, current: int, calm_seconds: float
) -> int:
    """Replicas that shall run: up at once, down when fewer have been enough for a while."""
    need = needed_replicas(bounds, demand, capacity)
    if need >= current or calm_seconds >= SCALE_DOWN_SECONDS:
        return need
    return min(current, bounds.upper)
