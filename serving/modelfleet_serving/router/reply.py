"""The answer to one request, as it goes to the client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelfleet_serving.contract import HEADER_FALLBACK
from modelfleet_serving.router import wire
from modelfleet_serving.router.api import Kind
from modelfleet_serving.router.continuation import Recorder, Splice, strip_usage
from modelfleet_serving.router.digits import write_digits
from modelfleet_serving.router.errors import RequestError, error_object
from modelfleet_serving.router.policy.recorder import COMPACT
from modelfleet_serving.router.relay import (
    LAST_CHUNK,
    ChunkedRelay,
    ErrorRelay,
    EventRelay,
    PlainRelay,
    Relay,
    SizedRelay,
    SpliceRelay,
    frame,
)
from modelfleet_serving.router.stored import remember
from modelfleet_serving.router.transport import SocketTransport
from modelfleet_serving.router.usage import KEY as USAGE_KEY
from modelfleet_serving.router.usage import read_usage

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.response import ResponseHead
    from modelfleet_serving.router.transport import ByteTransport
    from modelfleet_serving.router.upstream import UpstreamConnection

_CONTINUABLE = (Kind.CHAT, Kind.COMPLETION)
_USAGE_BYTES = 1024
"""A usage object with all its details is smaller."""
_TUNNEL = b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n"
)


class Reply:
    """What the client gets, and what it was.

    Attributes:
        status: 0 before there is one.
        opened: a stream's head was sent before any engine answered, to keep the client's connection alive.
        events: the body is a stream of events.
        first_byte: seconds from the request to the engine's first byte.
        usage: input and output tokens by the engine's word.
        strip_usage: the client did not ask for the stream's usage event.
        shortcut: passes regular chunks of a stream of events on without coming here, where that is possible.
        recorder: keeps what the client has got of a stream that another engine could go on with.
        splice: joins the stream of the engine that goes on.
    """

    __slots__ = (
        "_first_usage",
        "_last_usage",
        "_pieces",
        "_tail",
        "_written_at",
        "events",
        "exchange",
        "first_byte",
        "opened",
        "recorder",
        "relay",
        "shortcut",
        "splice",
        "stats",
        "status",
        "strip_usage",
        "transport",
        "usage",
    )

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.transport: ByteTransport = exchange.client.transport
        self.status = 0
        self.events = self.opened = False
        self.strip_usage = exchange.strip_usage
        self.first_byte: float | None = None
        self._written_at = 0.0
        self.usage: tuple[int, int] | None = None
        self.relay: Relay | None = None
        self.recorder: Recorder | None = None
        self.splice: Splice | None = None
        self.shortcut: Any = None
        self._first_usage = self._last_usage = self._tail = b""
        self._pieces = 0

    @property
    def written_at(self) -> float:
        """Loop time of the last piece of the body, or of the time from which the next one is awaited."""
        return self._written_at if self.shortcut is None else max(self._written_at, self.shortcut.last)

    @property
    def pieces(self) -> int:
        """Of a stream of events that went out, about a token each."""
        return self._pieces if self.shortcut is None else self._pieces + self.shortcut.pieces

    def await_next(self) -> None:
        """Nothing could come until now."""
        self._written_at = self.exchange.worker.now()

    # --- The beginning ---

    def open(self) -> None:
        """Begins a stream of events before any engine answers."""
        exchange = self.exchange
        self.opened = self.events = True
        self.status = 200
        extra = exchange.lease.headers if exchange.lease is not None else b""
        if exchange.worker.cors:
            extra += exchange.worker.cors_headers(exchange.request)
        self.transport.write(
            b"".join((_STREAM_HEAD, extra, b"x-request-id: ", exchange.request_id, b"\r\n\r\n"))
        )

    @property
    def takes_comments(self) -> bool:
        """The client's stream stands between two events, and further ones may come."""
        relay = self.relay
        if relay is None:
            return self.opened
        return isinstance(relay, EventRelay | SpliceRelay) and not self.exchange.request.http10

    def comment(self, text: bytes) -> None:
        """A line that clients of event streams ignore."""
        self.transport.write(frame(b": " + text + b"\n\n"))

    def begin(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        """Passes on an engine's head and what came of the body with it."""
        exchange = self.exchange
        worker = exchange.worker
        now = worker.now()
        endpoint = connection.endpoint
        self.stats = endpoint.variant.stats
        connection.stays = head.keep_alive and not exchange.request.upgrades
        if self.splice is not None:
            self._go_on(connection, head, rest, self.splice)
            return
        self.first_byte = waited = now - exchange.started
        self.stats.first_byte.observe(waited)
        self._written_at = now
        if self.opened:
            self._begin_opened(connection, head, rest)
            return
        self.status = head.status
        framing = self._choose_relay(head)
        extra = exchange.lease.headers if exchange.lease is not None else b""
        if exchange.fallback_from:
            extra += f"{HEADER_FALLBACK}: {exchange.fallback_from}\r\n".encode()
        if worker.cors:
            extra += worker.cors_headers(exchange.request)
        start = b"".join(
            (
                head.lines,
                framing,
                endpoint.headers(exchange.target.name),
                extra,
                b"x-request-id: ",
                exchange.request_id,
                b"\r\n\r\n",
            )
        )
        if head.status == 101:
            exchange.open_tunnel(connection, start + rest)
        elif self.relay is None:
            self.write_last(start, reusable=not rest)
        elif len(rest) == head.length:
            self.write_last(start + rest, reusable=True)
        else:
            self.transport.write(start)
            connection.relay = self.relay
            if rest:
                self.relay.feed(rest)
        if exchange.operation.stores and head.status == 200:
            remember(exchange, connection, rest)

    def _begin_opened(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        if head.status != 200 or not head.events:
            self.status = head.status if head.status >= 400 else 502
            self.relay = ErrorRelay(self, length=head.length, chunked_in=head.chunked)
        else:
            self.relay = EventRelay(self, chunked_in=head.chunked, chunked_out=True)
            self._record(chunked=True)
        connection.relay = self.relay
        if rest or not head.length:
            self.relay.feed(rest)

    def _record(self, *, chunked: bool) -> None:
        exchange = self.exchange
        if exchange.operation.kind in _CONTINUABLE and exchange.worker.settings.continue_streams:
            self.recorder = Recorder(chunked=chunked, tape=wire.Tape())

    def _go_on(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes, splice: Splice) -> None:
        """Passes on the stream of an engine that goes on for one that died."""
        http10 = self.exchange.request.http10
        self.relay = SpliceRelay(self, splice, chunked_in=head.chunked, chunked_out=not http10)
        self.stats.continued += 1
        connection.relay = self.relay
        if rest:
            self.relay.feed(rest)

    def _choose_relay(self, head: ResponseHead) -> bytes:
        """Decides how the body passes, and returns the header lines that say so."""
        if head.status == 101:
            return _TUNNEL
        request = self.exchange.request
        http10 = request.http10
        stays = self.exchange.client_stays()
        self.events = head.events
        if head.status in (204, 304):
            return b"\r\n" if stays else b"\r\nconnection: close\r\n"
        if head.length >= 0:
            self.relay = SizedRelay(self, head.length) if head.length else None
            if stays and not http10:
                return b"".join((b"\r\ncontent-length: ", write_digits(head.length), b"\r\n"))
            word = b"keep-alive" if stays else b"close"
            return b"\r\nconnection: %b\r\ncontent-length: %d\r\n" % (word, head.length)
        if head.events:
            self.relay = EventRelay(self, chunked_in=head.chunked, chunked_out=not http10)
            self._record(chunked=not http10)
        elif head.chunked and not http10:
            self.relay = ChunkedRelay(self)
        else:
            self.relay = PlainRelay(self, chunked_in=head.chunked, chunked_out=not http10)
        if http10:
            request.keep_alive = False
            return b"\r\nconnection: close\r\n"
        connection = b"" if stays else b"connection: close\r\n"
        return b"\r\n" + connection + b"transfer-encoding: chunked\r\n"

    # --- The body: called by the relays ---

    def write(self, data: bytes) -> None:
        """Passes a piece of the body on. Its usage may stand anywhere in it, also across two pieces."""
        read = self._tail + data
        if USAGE_KEY in read:
            self._last_usage = read[read.rfind(USAGE_KEY) :][:_USAGE_BYTES]
        self._tail = read[-_USAGE_BYTES:]
        self._written_at = self.exchange.worker.now()
        self.transport.write(data)

    def write_events(self, data: bytes, *, usage: bool) -> None:
        """Passes whole events on; ``usage`` says whether one may tell it."""
        now = self.exchange.worker.now()
        self.stats.gap.observe(now - self.written_at)
        self._written_at = now
        self._pieces += 1
        if usage:
            if not self._last_usage:
                self._first_usage = data
            self._last_usage = data
        if self.recorder is not None:
            self.recorder.add(data)
        self.transport.write(data)

    def write_chunks(self, data: bytes, *, usage: bool) -> None:
        """Passes on whole events in whole chunks, as they came; what is like them may take a shortcut."""
        self.write_events(data, usage=usage)
        upstream = self.exchange.upstream
        source = upstream.transport if upstream is not None else None
        if usage or wire.Shortcut is None or not isinstance(source, SocketTransport):
            return
        if self.shortcut is None:
            kept = self.recorder.kept if self.recorder is not None else None
            gap = self.stats.gap
            self.shortcut = wire.Shortcut(gap.bounds, gap.counts, kept, COMPACT)
        source.pass_to(self.transport, self.shortcut, self._written_at)

    def write_last(self, data: bytes, *, reusable: bool) -> None:
        """Passes the end of the answer on."""
        if data:
            self.transport.write(data)
            if self.status == 200:
                self._read_usage(self._tail + data if self._tail else data)
        self.exchange.answered(reusable=reusable)

    def without_usage(self, events: bytes) -> bytes:
        """Leaves out the event that tells nothing but the usage, for which the router had asked."""
        self._last_usage = events
        return strip_usage(events)

    def _read_usage(self, last: bytes) -> None:
        usage = read_usage(last) or (read_usage(self._last_usage) if self._last_usage else None)
        if usage is not None:
            if not usage[0] and self._first_usage:
                # Anthropic's streams tell the input at the beginning and the output at the end.
                first = read_usage(self._first_usage)
                usage = (first[0] if first is not None else 0, usage[1])
            self.usage = usage
            self.stats.input_tokens += usage[0]
            self.stats.output_tokens += usage[1]

    # --- The end that should not be ---

    def end_with_error(self, error: RequestError) -> bool:
        """Ends an answer that has begun so that nobody takes it for whole.

        Returns:
            Whether the client's connection may go on.
        """
        exchange = self.exchange
        if not self.events:
            return False
        anthropic = exchange.operation.anthropic
        event = b"data: " + error.body(anthropic=anthropic) + b"\n\n"
        if anthropic:
            event = b"event: error\n" + event
        if exchange.request.http10:
            self.transport.write(event)
            return False
        if self.relay is None:
            # Nothing of an engine's has gone out: the error is the whole answer.
            self.transport.write(frame(event) + LAST_CHUNK)
            return True
        self.transport.write(frame(event))
        return False

    def end_opened(self, body: bytes, *, reusable: bool) -> None:
        """Ends a stream, opened before the engine's answer, with the error that this was."""
        anthropic = self.exchange.operation.anthropic
        event = b"data: " + error_object(self.status, body, anthropic=anthropic) + b"\n\n"
        if anthropic:
            event = b"event: error\n" + event
        self.write_last(frame(event) + LAST_CHUNK, reusable=reusable)

    def close(self) -> None:
        """Nothing comes any more."""
        self.relay = None
        if self.shortcut is not None:
            self.shortcut.close()

    def close_stream(self, events: bytes) -> None:
        """Ends a stream whose engine died after the last of its text."""
        if self.exchange.request.http10:
            self.write_last(events, reusable=False)
        else:
            self.write_last((frame(events) if events else b"") + LAST_CHUNK, reusable=False)
