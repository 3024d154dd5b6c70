"""Accelerators that were asked for and have not come in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

FORGIVE_FACTOR: Final = 4
"""An accelerator is tried again after so many times the time that it was waited for."""


@dataclass
class PendingTracker:
    """Since when which variant waits for which accelerator.

    Attributes:
        limit: seconds that a variant waits before it takes its next preference.
    """

    limit: float
    _since: dict[tuple[str, str], float] = field(default_factory=dict)
    _late: dict[str, float] = field(default_factory=dict)

    def note(self, waiting: Mapping[str, str], now: float) -> None:
        """Begin to count for what has just begun to wait.

        Args:
            waiting: accelerator by variant.
            now: monotonic seconds.
        """
        self._since = {pair: self._since.get(pair, now) for pair in waiting.items()}

    def next_late(self) -> float | None:
        """Monotonic seconds at which the next accelerator is late; ``None`` when none is waited for."""
        return min(
            (
                since + self.limit
                for (_, accelerator), since in self._since.items()
                if accelerator not in self._late
            ),
            default=None,
        )

    def late(self, waiting: Mapping[str, str], now: float) -> frozenset[str]:
        """Accelerators that are late.

        Args:
            waiting: accelerator by variant.
            now: monotonic seconds.
        """
        self.note(waiting, now)
        for (_, accelerator), since in self._since.items():
            if now - since >= self.limit:
                self._late.setdefault(accelerator, now)
        self._late = {a: t for a, t in self._late.items() if now - t < self.limit * FORGIVE_FACTOR}
        return frozenset(self._late)
