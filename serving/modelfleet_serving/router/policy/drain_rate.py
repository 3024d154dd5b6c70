"""How fast a queue drains, from what left it lately."""

from __future__ import annotations

import math
from typing import Final

_WINDOW: Final = 30.0


class DrainRate:
    """Rate of an event, with weights that fade exponentially over half a minute."""

    __slots__ = ("_count", "_first", "_last")

    def __init__(self) -> None:
        self._count = 0.0
        self._first = self._last = -math.inf

    def add(self, now: float) -> None:
        """It happened."""
        if self._first == -math.inf:
            self._first = now
            self._last = now
            return  # opens the first interval
        self._count = self._count * math.exp((self._last - now) / _WINDOW) + 1
        self._last = now

    def per_second(self, now: float) -> float:
        """Events a second; 0 while nothing is known."""
        age = now - self._first
        if age <= 0 or self._count == 0:
            return 0.0
        # While the history is shorter than the window its weights sum to less than the window.
        seen = _WINDOW * (1 - math.exp(-age / _WINDOW))
        return self._count * math.exp((self._last - now) / _WINDOW) / seen
