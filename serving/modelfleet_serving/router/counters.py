"""Memory that the worker processes of one router share.

Counters stand in rows with one cell per worker. A worker writes only its own cell, so no lock is needed, and
the count of a row is the sum of its cells. The cells of a worker that died are zeroed by the supervisor: a
crash leaks nothing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from modelfleet_serving.router.affinity import DEFAULT_BYTES
from modelfleet_serving.router.policy.quota import RATES, TenantRows

ROWS: Final = 65_536
TENANT_ROWS: Final = 16_384
_CELL: Final = 4
_COLLECTED: Final = 2_000


class Counters:
    """The shared memory, as one worker sees it.

    Attributes:
        cells: requests in flight, row by row; this worker's cell of ``row`` is ``row * workers + worker``.
        reading: likewise, KiB of prompts that an engine has got and not begun to answer.
        tenants: what tenants use.
        routers: in its one cell, how many routers share the engines, as far as is known.
        prefixes: memory of the prefix table.
    """

    __slots__ = (
        "_memory",
        "_running",
        "_views",
        "cells",
        "fd",
        "prefixes",
        "reading",
        "routers",
        "tenants",
        "worker",
        "workers",
    )

    def __init__(self, workers: int = 1, worker: int = 0, fd: int | None = None) -> None:
        """Maps the memory behind ``fd``, or makes it when there is none."""
        counts = ROWS * workers * _CELL
        running = TENANT_ROWS * workers * _CELL
        rates = TENANT_ROWS * RATES * 8
        sizes = (
            DEFAULT_BYTES,
            TENANT_ROWS * 8,
            rates,
            rates * workers,
            counts,
            counts,
            running,
            TENANT_ROWS * _CELL,
            8,
        )
        if fd is None:
            fd = _anonymous_file()
            os.ftruncate(fd, sum(sizes))
        self.fd = fd
        self.workers = workers
        self.worker = worker
        self._memory = mmap.mmap(fd, sum(sizes))
        whole = memoryview(self._memory)
        parts = []
        start = 0
        for size in sizes:
            parts.append(whole[start : start + size])
            start += size
        self.prefixes = parts[0]
        tags, rated, charged = parts[1].cast("q"), parts[2].cast("d"), parts[3].cast("d")
        self.cells, self.reading = parts[4].cast("i"), parts[5].cast("i")
        self._running, elsewhere = parts[6].cast("i"), parts[7].cast("i")
        self.routers = parts[8].cast("q")
        self._views: list[memoryview[Any]] = [tags, rated, charged, elsewhere, self.routers]
        self.tenants = TenantRows(tags, rated, self._running, elsewhere, charged, workers, worker)

    def cell(self, row: int) -> int:
        """Index of this worker's cell of a row."""
        return row * self.workers + self.worker

    def total(self, row: int) -> int:
        """Requests in flight of a row, over all workers."""
        if self.workers == 1:
            return self.cells[row]
        start = row * self.workers
        return sum(self.cells[start : start + self.workers])

    def total_reading(self, row: int) -> int:
        """KiB of unanswered prompts of a row, over all workers."""
        if self.workers == 1:
            return self.reading[row]
        start = row * self.workers
        return sum(self.reading[start : start + self.workers])

    def clear_worker(self, worker: int) -> None:
        """Forgets what a worker that is gone had counted."""
        for cells in (self.cells, self.reading, self._running):
            for index in range(worker, len(cells), self.workers):
                if cells[index]:
                    cells[index] = 0

    def close(self) -> None:
        """Unmaps the memory, unless something still looks at it; then the end of the process does."""
        for view in (self.cells, self.reading, self._running, *self._views):
            view.release()
        with contextlib.suppress(BufferError):
            self._memory.close()
        os.close(self.fd)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("modelfleet-router", 0)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class RowAllocator:
    """Hands rows to keys. A row goes back only when its count is zero, so no late decrement hits another."""

    def __init__(self, total: Callable[[int], int], rows: int = ROWS) -> None:
        self._total = total
        self._free = list(range(rows - 1, 0, -1))
        self._rows: dict[str, int] = {}
        self._retired: deque[int] = deque()

    def row(self, key: str) -> int:
        """The row of a key; row 0, shared and only roughly right, when all are taken."""
        row = self._rows.get(key)
        if row is None:
            row = self._free.pop() if self._free else 0
            self._rows[key] = row
        return row

    def release(self, key: str) -> None:
        """Gives a key's row back once nothing is counted on it."""
        row = self._rows.pop(key, 0)
        if row:
            self._retired.append(row)

    def collect(self) -> None:
        """Frees retired rows whose count has come to zero; looks at some of them each time."""
        retired = self._retired
        for _ in range(min(_COLLECTED, len(retired))):
            row = retired.popleft()
            if self._total(row):
                retired.append(row)
            else:
                self._free.append(row)
