"""What a worker counts: plain integers on the data path, turned into metrics when they are asked for."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

# Seconds. First byte: from a cache hit on a small model to a long prefill. Gap: 5 ms to a stall.
FIRST_BYTE_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAP_BOUNDS: Final = (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
DURATION_BOUNDS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts by bucket, the last one open."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class VariantStats:
    """Counters of one (model, variant); the variant is empty where none was chosen."""

    __slots__ = (
        "continued",
        "duration",
        "ejections",
        "failures",
        "fallbacks",
        "first_byte",
        "gap",
        "model",
        "prompt_tokens",
        "queue_wait",
        "requests",
        "retries",
        "statuses",
        "tokens",
        "variant",
    )

    def __init__(self, model: str, variant: str) -> None:
        self.model = model
        self.variant = variant
        self.requests = 0
        self.statuses: dict[int, int] = {}
        self.failures = 0
        self.retries = 0
        self.fallbacks = 0
        self.continued = 0
        self.ejections = 0
        self.prompt_tokens = 0
        self.tokens = 0
        self.first_byte = Histogram(FIRST_BYTE_BOUNDS)
        self.gap = Histogram(GAP_BOUNDS)
        self.duration = Histogram(DURATION_BOUNDS)
        self.queue_wait = Histogram(FIRST_BYTE_BOUNDS)
