"""Server-sent events as bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_END: Final = re.compile(rb"\r?\n\r?\n")
DONE: Final = b"[DONE]"


def events(payload: bytes) -> Iterator[bytes]:
    """The whole events in ``payload``, each with the empty line that ends it; a rest is left out."""
    start = 0
    for end in _END.finditer(payload):
        yield payload[start : end.end()]
        start = end.end()


def data_of(event: bytes) -> bytes:
    """The data of an event: its ``data`` lines, empty for comments."""
    line = event.rstrip(b"\r\n")
    if line.startswith(b"data: ") and b"\n" not in line:
        return line[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


class EventSplitter:
    """Cuts a stream between events, however it was cut before."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, payload: bytes) -> list[bytes]:
        """The events that ``payload`` completes."""
        whole = list(events(self._pending + payload))
        self._pending = (self._pending + payload)[sum(map(len, whole)) :]
        return whole

    @property
    def pending(self) -> int:
        """Bytes of an event that isn't complete."""
        return len(self._pending)
