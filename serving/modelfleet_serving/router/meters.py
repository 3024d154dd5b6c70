"""What a worker counts while requests pass: plain numbers, made into :mod:`observe`'s records when asked."""

from __future__ import annotations

from array import array
from bisect import bisect_left

from modelfleet_serving.router.observe import (
    DURATION_BOUNDS,
    FIRST_BYTE_BOUNDS,
    GAP_BOUNDS,
    Histogram,
    VariantStats,
)


class Distribution:
    """Counts by bucket, the last one open."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        bucket = 0
        for bound in self._bounds:
            if value <= bound:
                break
            bucket += 1
        self._counts[bucket] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        """The counts so far."""
        return Histogram(self._bounds, list(self._counts), self._sum)


class SharedDistribution:
    """The same, in memory where C counts, too.

    Attributes:
        bounds: upper ends of all buckets but the last, an array of doubles.
        counts: values in each bucket, and the sum of all behind them: an array of doubles, which are exact
            for counts.
    """

    __slots__ = ("_bounds", "bounds", "counts")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.bounds = array("d", bounds)
        self.counts = array("d", bytes(8 * (len(bounds) + 2)))

    def observe(self, value: float) -> None:
        """Counts one value."""
        counts = self.counts
        counts[bisect_left(self._bounds, value)] += 1
        counts[-1] += value

    def histogram(self) -> Histogram:
        """The counts so far."""
        *counts, total = self.counts
        return Histogram(self._bounds, [int(number) for number in counts], total)


class VariantMeter:
    """Counters of one (model, variant); the fields are those of :class:`observe.VariantStats`."""

    __slots__ = (
        "_model",
        "_variant",
        "continued",
        "duration",
        "ejections",
        "failures",
        "fallbacks",
        "first_byte",
        "gap",
        "input_tokens",
        "output_tokens",
        "queue_wait",
        "requests",
        "retries",
        "statuses",
    )

    def __init__(self, model: str, variant: str) -> None:
        self._model = model
        self._variant = variant
        self.requests = self.failures = self.retries = self.fallbacks = 0
        self.continued = self.ejections = self.input_tokens = self.output_tokens = 0
        self.statuses: dict[int, int] = {}
        self.first_byte = Distribution(FIRST_BYTE_BOUNDS)
        self.gap = SharedDistribution(GAP_BOUNDS)
        self.duration = Distribution(DURATION_BOUNDS)
        self.queue_wait = Distribution(FIRST_BYTE_BOUNDS)

    @property
    def used(self) -> bool:
        """Anything was counted."""
        return bool(self.requests or self.statuses or self.ejections)

    def stats(self) -> VariantStats:
        """The counts so far."""
        return VariantStats(
            model=self._model,
            variant=self._variant,
            requests=self.requests,
            statuses=dict(self.statuses),
            failures=self.failures,
            retries=self.retries,
            fallbacks=self.fallbacks,
            continued=self.continued,
            ejections=self.ejections,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            first_byte=self.first_byte.histogram(),
            gap=self.gap.histogram(),
            duration=self.duration.histogram(),
            queue_wait=self.queue_wait.histogram(),
        )
