"""Start-time fair queueing: who is next among those that wait, by what each has had.

Every flow has a start tag; the smallest is next, and being served moves it on by cost over weight. A flow
that comes back after a pause starts at the current virtual time: what it did not use is not saved up.
(Goyal, Vin, Cheng: Start-time Fair Queueing, 1996.)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class FairOrder(Generic[K]):
    """The order of flows that have something waiting.

    Flows are added when they begin to wait and dropped when nothing of theirs waits any more.
    """

    __slots__ = ("_entries", "_heap", "_past", "_serial", "_time")

    def __init__(self) -> None:
        self._time = 0.0
        self._heap: list[tuple[float, int, int, K]] = []
        self._entries: dict[K, tuple[float, int, int, K]] = {}
        self._past: dict[K, float] = {}
        """Tags of flows that left ahead of the virtual time: they can't gain by leaving."""
        self._serial = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def add(self, key: K, rank: int = 0) -> None:
        """A flow begins to wait. Of flows that have had as much, the one of lower rank goes first."""
        if key not in self._entries:
            self._push(key, max(self._time, self._past.pop(key, 0.0)), rank)

    def drop(self, key: K) -> None:
        """Nothing of a flow waits any more."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if not self._entries:
            self._heap.clear()
            self._past.clear()
            self._time = 0.0
        elif entry[0] > self._time:
            self._past[key] = entry[0]

    def serve(self, key: K, cost: float) -> None:
        """A flow got its turn; ``cost`` is over its weight already."""
        start, rank, _, _ = self._entries[key]
        self._time = max(self._time, start)
        self._push(key, start + cost, rank)
        if len(self._past) > 64 + 2 * len(self._entries):
            self._past = {flow: tag for flow, tag in self._past.items() if tag > self._time}

    def first(self, able: Callable[[K], bool]) -> K | None:
        """The flow whose turn it is among those that are ``able`` to take one now."""
        heap = self._heap
        while heap and self._entries.get(heap[0][3]) is not heap[0]:
            heapq.heappop(heap)
        if not heap:
            return None
        if able(heap[0][3]):
            return heap[0][3]
        return min(
            (entry for entry in self._entries.values() if able(entry[3])),
            key=lambda entry: entry[:3],
            default=(0.0, 0, 0, None),
        )[3]

    def _push(self, key: K, start: float, rank: int) -> None:
        entry = self._entries[key] = (start, rank, next(self._serial), key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 2 * len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
