"""Keeps what a client has got of a stream, so that another replica can go on from there.

While the stream runs, appending is all that happens to a chunk. Every 128 KB what was kept is decoded and
only its text stays, so that a thousand long streams take some dozen megabytes and not a gigabyte.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from modelfleet_serving.router.policy.delivered import Delivered, decode
from modelfleet_serving.router.policy.events import EventSplitter, data_of
from modelfleet_serving.router.response import ChunkScanner, FramingError

COMPACT: Final = 128 * 1024
"""Bytes of a stream that are kept as they are."""
MAX_TEXT: Final = 4 * 1024 * 1024
"""Characters beyond which a stream is not continued."""


class Recorder:
    """Takes the bytes that a client gets.

    Args:
        chunked: They are in HTTP's chunks.
        tape: Where they are kept: an empty ``bytearray``, or what does the same.

    Attributes:
        kept: what was added since it was last read. A shortcut appends here, too.
    """

    __slots__ = ("_delivered", "_scanner", "_splitter", "kept")

    def __init__(self, *, chunked: bool, tape: Any = None) -> None:
        self.kept: Any = bytearray() if tape is None else tape
        self._delivered: Delivered | None = Delivered()
        self._splitter = EventSplitter()
        self._scanner = ChunkScanner() if chunked else None

    def add(self, data: bytes) -> None:
        """Takes bytes as they went to the client."""
        if self._delivered is None:
            self.kept.clear()  # a shortcut goes on appending
            return
        self.kept += data
        if len(self.kept) > COMPACT:
            self.read()

    def read(self) -> Delivered | None:
        """What the client has got; ``None`` when that was too much or could not be read."""
        payload = bytes(self.kept)
        self.kept.clear()
        delivered = self._delivered
        if delivered is None:
            return None
        try:
            if not self._read_quickly(payload, delivered):
                self._read_exactly(payload, delivered)
        except (msgspec.DecodeError, FramingError, UnicodeDecodeError):
            self._delivered = None
        delivered.settle()
        if delivered.size > MAX_TEXT or self._splitter.pending > COMPACT:
            self._delivered = None
        return self._delivered

    def _read_quickly(self, payload: bytes, delivered: Delivered) -> bool:
        """Reads whole events, each with one line of data, and looks at no framing: False when they aren't.

        Framing between events is skipped. Inside one it breaks the JSON: a size between two tokens, or a line
        end in a string, is never valid.
        """
        end = b"\n\n" if self._scanner is None else b"\n\n\r\n"
        if self._splitter.pending or not payload.endswith(end):
            return False
        if self._scanner is not None and not self._scanner.at_boundary:
            return False
        try:
            chunks = [
                decode(piece[piece.index(b"data: ") + 6 :])
                for piece in payload.split(b"\n\n")
                if b"data:" in piece and not piece.endswith(b"data: [DONE]")
            ]
        except (ValueError, msgspec.DecodeError):
            return False  # such events are read one by one
        take = delivered.take
        for chunk in chunks:
            take(chunk)
        # Inside JSON a line end is escaped: this is no text.
        delivered.done = delivered.done or b"data: [DONE]\n\n" in payload
        return True

    def _read_exactly(self, payload: bytes, delivered: Delivered) -> None:
        if self._scanner is not None:
            out: list[bytes] = []
            self._scanner.feed(payload, out)
            payload = b"".join(out)
        for event in self._splitter.feed(payload):
            delivered.take_data(data_of(event))
