"""How busy a replica is: what it runs, and what it has still to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from modelfleet_serving.router import wire
from modelfleet_serving.router.policy.group import Group, R

READING_KIB: Final = 2
"""KiB of prompt waiting for prefill that count as one running request."""


_SMALL: Final = 16 * 1024
_STRIDE: Final = 4096
_PROBES: Final = 32
_WINDOW: Final = 384
_MEDIA: Final = 64
"""Bytes of base64 that cost an engine about as much as one byte of text: 200 KB of image are 800 tokens."""


_BYTES_PER_TOKEN: Final = 4


def estimate_tokens(size: int) -> int:
    """Tokens that a body of so many bytes probably has, for a reservation."""
    return size // _BYTES_PER_TOKEN


def prompt_kib(size: int) -> int:
    """Bytes of prompt as the counter of pending prompts takes them."""
    return (size + 1023) >> 10


def readable_bytes(data: bytes, start: int = 0) -> int:
    """How many bytes of text a body amounts to for an engine: images and audio in base64 count for little.

    Looks at no more than 63 places of a body, and at none of a small one. Base64 shows by what it doesn't
    have: white space, quotes, escapes, and anything but ASCII.

    Args:
        data: Holds the body.
        start: Where that begins.
    """
    if wire.readable_bytes is not None:
        readable: int = wire.readable_bytes(data, start)
        return readable
    size = len(data) - start
    if size < _SMALL:
        return size
    stride = max(_STRIDE, size // _PROBES)
    places = range(start, start + size, stride)
    media = 0
    for place in places:
        window = data[place : place + _WINDOW]
        # What text has most is looked for first.
        if b" " not in window and b'"' not in window:
            media += b"\\" not in window and window.isascii()
    return size - media * size // len(places) * (_MEDIA - 1) // _MEDIA


def unread_kib(readable: int, size: int = 0, held: int = 0) -> int:
    """KiB that an engine has to read of a request; of its prompt of ``size`` bytes it holds ``held``.

    Args:
        readable: Of the whole body, from :func:`readable_bytes`.
        size: Of the prompt, 0 when it isn't known.
        held: Bytes of the prompt in the engine's cache.
    """
    return prompt_kib(readable - readable * held // size if size else readable)


FULL: Final = math.inf
"""Load of a replica that has no room for a request."""


class LoadView:
    """Loads of replicas, in running requests.

    The number of requests in flight alone misjudges engines: one 32 KB prompt that waits for its prefill
    delays the next first token more than twenty requests that are generating. So prompts that have not been
    answered with a first byte count too.

    Args:
        total: Requests in flight of a counter row.
        pending: KiB of prompts (less what the replica's cache held) without a first byte, of a counter row.
            ``None`` where nobody counts them: then the number of requests decides alone.
    """

    def __init__(self, total: Callable[[int], int], pending: Callable[[int], int] | None = None) -> None:
        self._total = total
        self._pending = pending

    def running(self, row: int) -> int:
        """Requests in flight of a counter row."""
        return self._total(row)

    def unread(self, row: int) -> int:
        """KiB of prompts without a first byte of a counter row."""
        return 0 if self._pending is None else self._pending(row)

    def of(self, group: Group[R], index: int) -> float:
        """Load of a member; :data:`FULL` when it has no room for a request."""
        row = group.rows[index]
        running = self.running(row)
        if running >= group.limits[index]:
            return FULL
        load = running + self.unread(row) / READING_KIB
        scale = group.scale
        return load if scale is None else (load + 1.0) * scale[index]

    def of_all(self, group: Group[R]) -> list[float]:
        """Load of each member."""
        return [self.of(group, index) for index in range(len(group.rows))]


class SharedLoadView(LoadView):
    """Loads by the counters that all workers of a router share.

    Args:
        cells: Requests in flight, ``workers`` cells a row.
        reading: Likewise, KiB of prompts without a first byte.
        workers: Workers that share them.
    """

    def __init__(self, cells: memoryview[int], reading: memoryview[int], workers: int) -> None:
        self._cells = cells
        self._reading = reading
        self._workers = workers

    def running(self, row: int) -> int:
        """Requests in flight of a counter row."""
        workers = self._workers
        if workers == 1:
            return self._cells[row]
        return sum(self._cells[row * workers : (row + 1) * workers])

    def unread(self, row: int) -> int:
        """KiB of prompts without a first byte of a counter row."""
        workers = self._workers
        if workers == 1:
            return self._reading[row]
        return sum(self._reading[row * workers : (row + 1) * workers])
