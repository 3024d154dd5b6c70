"""Passes an answer's body from engine to client.

Bytes go on as they came wherever the framing allows it. A stream of events is only ever cut between two
events, so that an error, a comment or another replica's continuation can follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.continuation import Splice, may_hold_usage
from modelfleet_serving.router.response import ChunkScanner, FramingError, is_one_chunk
from modelfleet_serving.router.usage import KEY as USAGE_KEY

if TYPE_CHECKING:
    from modelfleet_serving.router.reply import Reply
    from modelfleet_serving.router.transport import ByteTransport

MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
_MAX_ERROR_BYTES: Final = 64 * 1024
_EVENT_ENDS: Final = (b"\n\n\r\n", b"\r\n\r\n\r\n")
LAST_CHUNK: Final = b"0\r\n\r\n"


def frame(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class Relay(ABC):
    """Takes the bytes of an answer's body."""

    __slots__ = ()

    @abstractmethod
    def feed(self, data: bytes) -> None:
        """Passes on what belongs to the body."""

    def eof(self) -> bool:
        """Whether the end of the connection is the end of the body: then it is passed on."""
        return False


class SizedRelay(Relay):
    """A body of known length, or one without: that ends with the connection."""

    __slots__ = ("_left", "_reply")

    def __init__(self, reply: Reply, length: int) -> None:
        self._reply = reply
        self._left = length

    def feed(self, data: bytes) -> None:
        """Passes on what belongs to the body."""
        left = self._left - len(data)
        if left > 0:
            self._left = left
            self._reply.write(data)
        elif left == 0:
            self._reply.write_last(data, reusable=True)
        else:
            self._reply.write_last(data[:left], reusable=False)


class ChunkedRelay(Relay):
    """A chunked body that is no stream of events, to a client that takes chunks."""

    __slots__ = ("_reply", "_scanner")

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._scanner = ChunkScanner()

    def feed(self, data: bytes) -> None:
        """Passes chunks on as they are."""
        end = self._scanner.feed(data)
        if end < 0:
            self._reply.write(data)
        else:
            self._reply.write_last(data[:end], reusable=end == len(data))


class PlainRelay(Relay):
    """Any body to a client without chunks (HTTP/1.0), or one that ends with the engine's connection."""

    __slots__ = ("_chunked_out", "_reply", "_scanner")

    def __init__(self, reply: Reply, *, chunked_in: bool, chunked_out: bool) -> None:
        self._reply = reply
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
            self._reply.write_last(last, reusable=end == len(data))
        elif payload:
            self._reply.write(payload)

    def eof(self) -> bool:
        """Ends the client's body when the engine's ends with its connection."""
        if self._scanner is not None:
            return False
        self._reply.write_last(LAST_CHUNK if self._chunked_out else b"", reusable=False)
        return True


class EventRelay(Relay):
    """A stream of server-sent events, cut between events only."""

    __slots__ = ("_chunked_out", "_pending", "_reply", "_scanner")

    def __init__(self, reply: Reply, *, chunked_in: bool, chunked_out: bool) -> None:
        self._reply = reply
        self._scanner = ChunkScanner() if chunked_in else None
        self._chunked_out = chunked_out
        self._pending = b""

    def feed(self, data: bytes) -> None:
        """Passes whole events on; nearly always these are whole chunks, which go on untouched."""
        scanner = self._scanner
        if scanner is None:
            self._split(data, -1, reusable=False)
            return
        reply = self._reply
        usage = USAGE_KEY in data
        if (
            self._chunked_out
            and not self._pending
            and scanner.at_boundary
            and not (usage and reply.strip_usage and may_hold_usage(data))
        ):
            if data.endswith(b"\n\n\r\n") and is_one_chunk(data):
                reply.write_chunks(data, usage=usage)
                return
            end = scanner.feed(data)
            if end < 0:
                if data.endswith(_EVENT_ENDS) and scanner.at_boundary:
                    reply.write_chunks(data, usage=usage)
                    return
            elif end == len(data):
                reply.write_last(data, reusable=True)
                return
            # Not the common case: read it again, for its contents.
            scanner = self._scanner = ChunkScanner()
        out: list[bytes] = []
        end = scanner.feed(data, out)
        self._split(b"".join(out), end, reusable=end == len(data))

    def _split(self, payload: bytes, end: int, *, reusable: bool) -> None:
        payload = self._pending + payload
        cut = len(payload) if end >= 0 else _last_event_end(payload)
        self._pending = payload[cut:]
        if len(self._pending) > MAX_EVENT_BYTES:
            raise FramingError(f"an event exceeds {MAX_EVENT_BYTES} bytes")
        events = payload[:cut]
        if self._reply.strip_usage and may_hold_usage(events):
            events = self._reply.without_usage(events)
        if end >= 0:
            last = LAST_CHUNK if self._chunked_out else b""
            self._reply.write_last(self._frame(events) + last, reusable=reusable)
        elif events:
            self._reply.write_events(self._frame(events), usage=USAGE_KEY in events)

    def _frame(self, payload: bytes) -> bytes:
        return frame(payload) if payload and self._chunked_out else payload

    def eof(self) -> bool:
        """Ends the client's stream when the engine's ends with its connection."""
        if self._scanner is not None:
            return False
        self._split(b"", 0, reusable=False)
        return True


class SpliceRelay(Relay):
    """The stream of an engine that goes on for one that died, made into the rest of the client's stream."""

    __slots__ = ("_chunked_out", "_reply", "_scanner", "_splice")

    def __init__(self, reply: Reply, splice: Splice, *, chunked_in: bool, chunked_out: bool) -> None:
        self._reply = reply
        self._splice = splice
        self._scanner = ChunkScanner() if chunked_in else None
        self._chunked_out = chunked_out

    def feed(self, data: bytes) -> None:
        """Passes on what the client has not had yet."""
        end = -1
        payload = data
        if self._scanner is not None:
            out: list[bytes] = []
            end = self._scanner.feed(data, out)
            payload = b"".join(out)
        events = self._splice.feed(payload)
        if self._splice.diverged:
            raise FramingError(f"did not go on where the other one had stopped: {self._splice.diverged}")
        if self._reply.strip_usage and may_hold_usage(events):
            events = self._reply.without_usage(events)
        if events:
            framed = frame(events) if self._chunked_out else events
            self._reply.write_events(framed, usage=USAGE_KEY in events)
        if end >= 0:
            self._reply.write_last(LAST_CHUNK if self._chunked_out else b"", reusable=end == len(data))

    def eof(self) -> bool:
        """Ends the client's stream when the engine's ends with its connection."""
        if self._scanner is not None:
            return False
        self._reply.write_last(LAST_CHUNK if self._chunked_out else b"", reusable=False)
        return True


class ErrorRelay(Relay):
    """An answer that is no stream, for a client whose stream was opened before: it becomes an event."""

    __slots__ = ("_left", "_parts", "_reply", "_room", "_scanner")

    def __init__(self, reply: Reply, *, length: int, chunked_in: bool) -> None:
        self._reply = reply
        self._left = length
        self._scanner = ChunkScanner() if chunked_in else None
        self._parts: list[bytes] = []
        self._room = _MAX_ERROR_BYTES

    def feed(self, data: bytes) -> None:
        """Gathers the body up to its end, or as much as anybody wants to read of an error."""
        whole = exact = False
        out = [data]
        if self._scanner is not None:
            out = []
            end = self._scanner.feed(data, out)
            whole, exact = end >= 0, end == len(data)
        elif self._left >= 0:
            self._left -= len(data)
            whole, exact = self._left <= 0, self._left == 0
        self._parts += out
        self._room -= len(data)
        if whole or self._room < 0:
            self._reply.end_opened(b"".join(self._parts), reusable=exact)

    def eof(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        if self._scanner is not None or self._left >= 0:
            return False
        self._reply.end_opened(b"".join(self._parts), reusable=False)
        return True


def _last_event_end(payload: bytes) -> int:
    """Where the last whole event ends; 0 when there is none."""
    plain = payload.rfind(b"\n\n")
    crlf = payload.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


class TunnelRelay(Relay):
    """What comes after a switch of protocols."""

    __slots__ = ("_transport",)

    def __init__(self, transport: ByteTransport) -> None:
        """``transport`` is the client's."""
        self._transport = transport

    def feed(self, data: bytes) -> None:
        """Passes everything on."""
        self._transport.write(data)
