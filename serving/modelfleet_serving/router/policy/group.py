"""Replicas that one request may choose between, with what the choice needs ready at hand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

from xxhash import xxh3_64_intdigest

_POINTS: Final = 32
_INDEX: Final = 0xFFFF
_POINT: Final = 0xFFFF_FFFF_FFFF_0000

UNLIMITED: Final = 1 << 30
"""``limit`` of a replica whose capacity isn't known."""


class Replica(Protocol):
    """What the policies must know of an endpoint."""

    @property
    def id(self) -> str:
        """Unique, and the same in every worker."""

    @property
    def row(self) -> int:
        """Row of its shared counter of requests in flight."""

    @property
    def limit(self) -> int:
        """Requests it may have in flight now.

        0 when it isn't ready or is ejected, 1 on probation, else its capacity, or :data:`UNLIMITED`.
        """

    @property
    def capacity(self) -> int | None:
        """Requests it runs at once, for comparing replicas of different size; ``None`` when unknown."""

    @property
    def revision(self) -> str:
        """Revision of the variant it runs."""

    @property
    def adapters(self) -> frozenset[str]:
        """LoRA adapters it has loaded."""


R = TypeVar("R", bound=Replica)


class Group(Generic[R]):
    """Usable replicas, immutable but for whose turn it is.

    Made anew when membership, state, health or capacity changes.

    Attributes:
        members: those with a limit above 0.
        rows: by member, its row of shared counters.
        limits: by member, requests it may have in flight.
        codes: by member, a 16-bit code: how the prefix table names it.
        by_code: index of a member by its code.
        turn: index of the member that got the last request by load alone.
        scale: by member, how much heavier a request weighs there than on the biggest one; ``None`` when all
            are equal, which is the common case.
    """

    def __init__(self, replicas: Sequence[R]) -> None:
        self.members: list[R] = [replica for replica in replicas if replica.limit > 0]
        self.rows: list[int] = [replica.row for replica in self.members]
        self.limits: list[int] = [replica.limit for replica in self.members]
        self.codes: list[int] = [replica_code(replica.id.encode()) for replica in self.members]
        self.by_code: dict[int, int] = {code: index for index, code in enumerate(self.codes)}
        self._ring: list[int] = []
        self.turn = 0
        sizes = {replica.capacity for replica in self.members}
        self.scale: list[float] | None = None
        if len(sizes) > 1:
            biggest = max(size or 1 for size in sizes)
            self.scale = [biggest / (replica.capacity or biggest) for replica in self.members]

    def _points(self) -> list[int]:
        """Points of a consistent hash ring, each with its member's index in the low bits."""
        if not self._ring:
            self._ring = sorted(
                xxh3_64_intdigest(member.id.encode(), point) & _POINT | index
                for index, member in enumerate(self.members)
                for point in range(_POINTS)
            )
        return self._ring

    def first(self, key: int) -> int:
        """Index of the member that is to take a key."""
        ring = self._points()
        return ring[bisect_right(ring, key & _POINT) % len(ring)] & _INDEX

    def walk(self, key: int) -> Iterator[int]:
        """Indices of all members in the order in which they are to take a key.

        The same in every process, and when a member comes or goes only the keys that it takes or had move.
        """
        ring = self._points()
        first = bisect_right(ring, key & _POINT)
        seen: set[int] = set()
        for position in range(first - len(ring), first):
            index = ring[position] & _INDEX
            if index not in seen:
                seen.add(index)
                yield index


def replica_code(name: bytes) -> int:
    """A replica's 16-bit code, never 0.

    Two replicas of one variant share a code once in 65,535 pairs; then one is taken for the other, which
    costs a cache miss.
    """
    return xxh3_64_intdigest(name) % 0xFFFF + 1
