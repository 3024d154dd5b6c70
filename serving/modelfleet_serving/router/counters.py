"""Counts of what engines have to do, shared by the worker processes of one router.

Every counter is a row with one cell per worker. A worker writes only its own cell, so no lock is needed, and
the count of a row is the sum of its cells. The cells of a worker that died are zeroed by the supervisor: a
crash leaks nothing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from typing import Final

from modelfleet_serving.router.affinity import DEFAULT_BYTES

ROWS: Final = 65_536
_CELL: Final = 4


class Counters:
    """Rows of shared counters, seen by one worker.

    Attributes:
        cells: all cells, row by row; this worker's cell of ``row`` is ``row * workers + worker``.
        reading: likewise, KiB of prompts that an engine has got and not begun to answer.
        prefixes: memory of the prefix table, which the workers share as well.
    """

    __slots__ = ("_memory", "cells", "fd", "prefixes", "reading", "worker", "workers")

    def __init__(self, workers: int = 1, worker: int = 0, fd: int | None = None, rows: int = ROWS) -> None:
        """Maps the memory behind ``fd``, or makes it when there is none."""
        size = 2 * rows * workers * _CELL + DEFAULT_BYTES
        if fd is None:
            fd = _anonymous_file()
            os.ftruncate(fd, size)
        self.fd = fd
        self.workers = workers
        self.worker = worker
        self._memory = mmap.mmap(fd, size)
        whole = memoryview(self._memory)
        self.prefixes = whole[:DEFAULT_BYTES]
        middle = DEFAULT_BYTES + rows * workers * _CELL
        self.cells = whole[DEFAULT_BYTES:middle].cast("i")
        self.reading = whole[middle:].cast("i")

    def cell(self, row: int) -> int:
        """Index of this worker's cell of a row."""
        return row * self.workers + self.worker

    def total(self, row: int) -> int:
        """Count over all workers."""
        if self.workers == 1:
            return self.cells[row]
        start = row * self.workers
        return sum(self.cells[start : start + self.workers])

    def total_reading(self, row: int) -> int:
        """KiB of unanswered prompts over all workers."""
        if self.workers == 1:
            return self.reading[row]
        start = row * self.workers
        return sum(self.reading[start : start + self.workers])

    def clear_worker(self, worker: int) -> None:
        """Forgets what a worker that is gone had counted."""
        for cells in (self.cells, self.reading):
            for index in range(worker, len(cells), self.workers):
                if cells[index]:
                    cells[index] = 0

    def close(self) -> None:
        """Unmaps the memory, unless something still looks at it; then the process's end does."""
        self.cells.release()
        self.reading.release()
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

    def __init__(self, counters: Counters, rows: int = ROWS) -> None:
        self._counters = counters
        self._free = list(range(rows - 1, 0, -1))
        self._rows: dict[str, int] = {}
        self._retired: list[int] = []

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
        """Frees retired rows whose count has come to zero."""
        still = [row for row in self._retired if self._counters.total(row)]
        if len(still) != len(self._retired):
            waiting = set(still)
            self._free.extend(row for row in self._retired if row not in waiting)
            self._retired = still
