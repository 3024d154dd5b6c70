"""How busy a replica is: what it runs, and what it has still to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from modelfleet_serving.router.policy.group import Group, R

READING_KIB: Final = 2
"""KiB of prompt waiting for prefill that count as one running request."""


_SMALL: Final = 16 * 1024
_STRIDE: Final = 4096
_PROBES: Final = 32
_WINDOW: Final = 384
_MEDIA: Final = 64
"""Bytes of base64 that cost an engine about as much as one byte of text: 200 KB of image are 800 tokens."""


def prompt_kib(size: int) -> int:
    """Bytes of prompt as the counter of pending prompts takes them."""
    return (size + 1023) >> 10


def readable_bytes(body: bytes) -> int:
    """How many bytes of text a body amounts to for an engine: images and audio in base64 count for little.

    Looks at no more than 63 places of a body, and at none of a small one. Base64 shows by what it doesn't
    have: white space, quotes, escapes, and anything but ASCII.
    """
    size = len(body)
    if size < _SMALL:
        return size
    stride = max(_STRIDE, size // _PROBES)
    places = range(0, size, stride)
    media = 0
    for place in places:
        end = place + _WINDOW
        # What text has most is looked for first.
        if body.find(b" ", place, end) < 0 and body.find(b'"', place, end) < 0:
            window = body[place:end]
            media += b"\\" not in window and window.isascii()
    return size - media * size // len(places) * (_MEDIA - 1) // _MEDIA


def reading_kib(body: bytes, size: int = 0, held: int = 0) -> int:
    """KiB that an engine has to read of a request; of its prompt of ``size`` bytes it holds ``held``."""
    read = readable_bytes(body)
    return prompt_kib(read - read * held // size if size else read)


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

    __slots__ = ("_pending", "_total")

    def __init__(self, total: Callable[[int], int], pending: Callable[[int], int] | None = None) -> None:
        self._total = total
        self._pending = pending

    def measure(self, group: Group[R], indices: Iterable[int]) -> dict[int, float]:
        """Load by index of those members that have room for a request."""
        members = group.members
        total = self._total
        pending = self._pending
        scale = group.scale
        loads: dict[int, float] = {}
        for index in indices:
            member = members[index]
            row = member.row
            load = float(total(row))
            if load < member.limit:
                if pending is not None:
                    load += pending(row) / READING_KIB
                loads[index] = load if scale is None else (load + 1) * scale[index]
        return loads
