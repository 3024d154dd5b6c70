"""Replicas as the policies see them, with counts that a test can set."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelfleet_serving.router.choice import UNLIMITED


@dataclass(eq=False)
class FakeReplica:
    id: str
    row: int
    limit: int = UNLIMITED
    capacity: int | None = None
    revision: str = ""
    adapters: frozenset[str] = frozenset()


@dataclass
class Fleet:
    """``count`` replicas, their requests in flight and their pending prompts in KiB."""

    count: int
    loads: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    replicas: list[FakeReplica] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loads = self.loads or [0] * self.count
        self.pending = self.pending or [0] * self.count
        self.replicas = [FakeReplica(f"replica-{row}", row) for row in range(self.count)]

    def total(self, row: int) -> int:
        return self.loads[row]

    def pending_total(self, row: int) -> int:
        return self.pending[row]
