"""Splits a sequence of requests by weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

_GOLDEN: Final = 0.6180339887498949


class Split:
    """Draws indices by weight: exact over time, and right in sum over independent workers.

    The draws follow a Weyl sequence, ``frac(start + n * golden ratio)``: the fraction with the lowest
    discrepancy, so that after ``n`` draws every index is within about ``log n`` of its share. A random draw
    is off by ``sqrt n``, and the usual smooth round robin starts every worker at the same index. The ratio
    is irrational: no pattern in the traffic resonates with it.

    Args:
        weights: Not negative, at least one above 0.
        start: 0..1, random for each worker and split.
    """

    __slots__ = ("_bounds", "_position", "_total")

    def __init__(self, weights: Sequence[float], start: float) -> None:
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights must not be negative and not all 0: {list(weights)}")
        self._bounds = list(accumulate(weights))
        self._total = self._bounds[-1]
        self._position = start % 1.0

    def draw(self, key: int | None = None) -> int:
        """The next index, or the one that a 64-bit hash always gets while the weights stay."""
        if key is None:
            position = self._position = (self._position + _GOLDEN) % 1.0
        else:
            position = key / 2**64
        # `position * total` may round up to `total`: the last index with a weight takes it.
        index = bisect_right(self._bounds, position * self._total)
        return index if index < len(self._bounds) else self._bounds.index(self._total)
