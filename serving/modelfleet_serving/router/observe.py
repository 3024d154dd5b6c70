"""What workers have counted, as they tell the supervisor; it adds up and turns into metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

# Seconds. First byte: from a cache hit on a small model to a long prefill. Gap: 1 ms to a stall.
FIRST_BYTE_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAP_BOUNDS: Final = (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
DURATION_BOUNDS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram(msgspec.Struct):
    """Counts by bucket, the last one open."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float = 0.0

    def add(self, other: Histogram) -> None:
        """Adds another process's counts."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)


def _histogram(bounds: tuple[float, ...]) -> Histogram:
    return Histogram(bounds, [0] * (len(bounds) + 1))


class VariantStats(msgspec.Struct, kw_only=True):
    """Counters of one (model, variant); the variant is empty where none was chosen."""

    model: str
    variant: str
    requests: int = 0
    """Arrivals."""
    statuses: dict[int, int] = {}
    """Finished requests by HTTP status; 499 where the client left."""
    failures: int = 0
    """Attempts that an engine failed."""
    retries: int = 0
    fallbacks: int = 0
    continued: int = 0
    ejections: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    queued: int = 0
    """Waiting now."""
    first_byte: Histogram = msgspec.field(default_factory=lambda: _histogram(FIRST_BYTE_BOUNDS))
    gap: Histogram = msgspec.field(default_factory=lambda: _histogram(GAP_BOUNDS))
    duration: Histogram = msgspec.field(default_factory=lambda: _histogram(DURATION_BOUNDS))
    queue_wait: Histogram = msgspec.field(default_factory=lambda: _histogram(FIRST_BYTE_BOUNDS))

    def add(self, other: VariantStats) -> None:
        """Adds another process's counts."""
        for status, number in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + number
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _HISTOGRAMS:
            getattr(self, name).add(getattr(other, name))


_HISTOGRAMS: Final = ("first_byte", "gap", "duration", "queue_wait")
_SUMMED: Final = tuple(
    name
    for name in VariantStats.__struct_fields__
    if name not in (*_HISTOGRAMS, "model", "variant", "statuses")
)


class Snapshot(msgspec.Struct, kw_only=True):
    """Everything that one worker has counted so far."""

    variants: list[VariantStats] = []
    refused: dict[int, int] = {}
    """Requests that reached no model, by HTTP status."""
    connections: int = 0
    """Client connections now."""
    active: int = 0
    """Requests now."""


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum over several workers."""
    total = Snapshot(variants=[], refused={})
    known: dict[tuple[str, str], VariantStats] = {}
    for snapshot in snapshots:
        total.connections += snapshot.connections
        total.active += snapshot.active
        for status, number in snapshot.refused.items():
            total.refused[status] = total.refused.get(status, 0) + number
        for stats in snapshot.variants:
            key = (stats.model, stats.variant)
            if key not in known:
                known[key] = VariantStats(model=stats.model, variant=stats.variant)
                total.variants.append(known[key])
            known[key].add(stats)
    return total


class LogEntry(msgspec.Struct, omit_defaults=True, gc=False):
    """One line of the access log. No header, key or body ever stands in it."""

    time: float
    client: str
    method: str
    path: str
    status: int
    seconds: float
    request: str
    model: str = ""
    variant: str = ""
    replica: str = ""
    fallback: str = ""
    tenant: str = ""
    first_byte: float | None = None
    attempts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
