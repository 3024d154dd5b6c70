"""Passes an answer's body from engine to client.

Bytes go on as they came wherever the framing allows it. A stream of events is only ever cut between two
events, so that an error, a comment or another replica's continuation can follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.response import ChunkScanner, FramingError

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange

MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
_EVENT_ENDS: Final = (b"\n\n\r\n", b"\r\n\r\n\r\n")
LAST_CHUNK: Final = b"0\r\n\r\n"


def frame(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class SizedRelay:
    """A body of known length, or one without: that ends with the connection."""

    __slots__ = ("_exchange", "_left")

    def __init__(self, exchange: Exchange, length: int) -> None:
        self._exchange = exchange
        self._left = length

    def feed(self, data: bytes) -> None:
        """Passes on what belongs to the body."""
        left = self._left - len(data)
        if left > 0:
            self._left = left
            self._exchange.write(data)
        elif left == 0:
            self._exchange.write_last(data, reusable=True)
        else:
            self._exchange.write_last(data[:left], reusable=False)

    def eof(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        return False


class ChunkedRelay:
    """A chunked body that is no stream of events, to a client that takes chunks."""

    __slots__ = ("_exchange", "_scanner")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._scanner = ChunkScanner()

    def feed(self, data: bytes) -> None:
        """Passes chunks on as they are."""
        end = self._scanner.feed(data)
        if end < 0:
            self._exchange.write(data)
        else:
            self._exchange.write_last(data[:end], reusable=end == len(data))

    def eof(self) -> bool:
        """A chunked body ends with its last chunk only."""
        return False


class PlainRelay:
    """Any body to a client without chunks (HTTP/1.0), or one that ends with the engine's connection."""

    __slots__ = ("_chunked_out", "_exchange", "_scanner")

    def __init__(self, exchange: Exchange, *, chunked_in: bool, chunked_out: bool) -> None:
        self._exchange = exchange
        self._scanner = ChunkScanner() if chunked_in else None
        self._chunked_out = chunked_out

    def feed(self, data: bytes) -> None:
        """Passes contents on in the client's framing."""
        end = -1
        if self._scanner is not None:
            out: list[bytes] = []
            end = self._scanner.feed(data, out)
            payload = b"".join(out)
        else:
            payload = data
        if payload and self._chunked_out:
            payload = frame(payload)
        if end >= 0:
            last = payload + LAST_CHUNK if self._chunked_out else payload
            self._exchange.write_last(last, reusable=end == len(data))
        elif payload:
            self._exchange.write(payload)

    def eof(self) -> bool:
        """Ends the client's body when the engine's ends with its connection."""
        if self._scanner is not None:
            return False
        self._exchange.write_last(LAST_CHUNK if self._chunked_out else b"", reusable=False)
        return True


class EventRelay:
    """A stream of server-sent events, cut between events only."""

    __slots__ = ("_chunked_out", "_exchange", "_pending", "_scanner")

    def __init__(self, exchange: Exchange, *, chunked_in: bool, chunked_out: bool) -> None:
        self._exchange = exchange
        self._scanner = ChunkScanner() if chunked_in else None
        self._chunked_out = chunked_out
        self._pending = b""

    def feed(self, data: bytes) -> None:
        """Passes whole events on; nearly always these are whole chunks, which go on untouched."""
        scanner = self._scanner
        if scanner is None:
            self._split(data, -1, reusable=False)
            return
        if self._chunked_out and not self._pending and scanner.at_boundary:
            end = scanner.feed(data)
            if end < 0:
                if data.endswith(_EVENT_ENDS) and scanner.at_boundary:
                    self._exchange.write_events(data)
                    return
            elif end == len(data):
                self._exchange.write_last(data, reusable=True)
                return
            # Not the common case: read it again, for its contents.
            scanner = self._scanner = ChunkScanner()
        out: list[bytes] = []
        end = scanner.feed(data, out)
        self._split(b"".join(out), end, reusable=end == len(data))

    def _split(self, payload: bytes, end: int, *, reusable: bool) -> None:
        payload = self._pending + payload
        if end >= 0:
            self._pending = b""
            self._exchange.write_last(
                self._frame(payload) + (LAST_CHUNK if self._chunked_out else b""), reusable=reusable
            )
            return
        cut = max(payload.rfind(b"\n\n") + 2, payload.rfind(b"\r\n\r\n") + 4)
        if cut < 4:
            cut = cut if payload[:cut].endswith(b"\n\n") else 0
        self._pending = payload[cut:]
        if len(self._pending) > MAX_EVENT_BYTES:
            raise FramingError(f"an event exceeds {MAX_EVENT_BYTES} bytes")
        if cut:
            self._exchange.write_events(self._frame(payload[:cut]))

    def _frame(self, payload: bytes) -> bytes:
        return frame(payload) if payload and self._chunked_out else payload

    def eof(self) -> bool:
        """Ends the client's stream when the engine's ends with its connection."""
        if self._scanner is not None:
            return False
        self._split(b"", 0, reusable=False)
        return True
