"""The client's side: HTTP/1.1 in, one request at a time, answers out."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

import httptools

from modelfleet_serving.router.api import OPERATIONS, Kind
from modelfleet_serving.router.errors import RequestError, status_line
from modelfleet_serving.router.exchange import Exchange
from modelfleet_serving.router.request import HEADER_CODES, Request

if TYPE_CHECKING:
    from modelfleet_serving.router.worker import Worker

_log = logging.getLogger(__name__)

WRITE_HIGH_WATER: Final = 256 * 1024
_SMALL_BODY: Final = 64 * 1024
"""A refused request up to this size is read first: its connection stays usable."""
_LINGER_BYTES: Final = 4 * 1024 * 1024
_LINGER_SECONDS: Final = 2.0
_MAX_TRAILERS: Final = 64
_MAX_FRAMING: Final = 1024 * 1024
_FRAMING_RATIO: Final = 16
"""Bytes on the wire for one of a body that may come in chunks of one byte, beyond the first MiB."""
_MIN_BODY_RATE: Final = 1024.0
_NEVER: Final = float("inf")


class ClientConnection:
    """One client connection: a protocol of asyncio.

    Requests are answered in order; of a pipelining client the further ones wait parsed. While a request runs
    the socket is still read, since only so a client that leaves is noticed at once.
    """

    __slots__ = (
        "_closing",
        "_discarded",
        "_early",
        "_held",
        "_parser",
        "_pending",
        "_reading_paused",
        "_request",
        "_synthetic",
        "_upgrading",
        "deadline",
        "exchange",
        "full",
        "full_since",
        "peer",
        "transport",
        "worker",
    )

    transport: asyncio.Transport

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.exchange: Exchange | None = None
        self.deadline = _NEVER
        self.full = False
        self.full_since = 0.0
        self.peer = ""
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._pending: deque[Request | RequestError] = deque()
        self._closing = False
        self._discarded = self._held = 0
        self._reading_paused = False
        self._synthetic = self._upgrading = False
        self._early = b""

    # --- Transport callbacks ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes a new connection."""
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        worker = self.worker
        if worker.access_log is not None:
            self.peer = format_peer(transport.get_extra_info("peername"))
        if len(worker.clients) >= worker.settings.max_connections:
            error = RequestError(503, "too many connections", code="too_many_connections", retry_after=1.0)
            self.respond_error(error, keep_alive=False)
            # It is no client: while it lingers it must not keep others out.
            worker.loop.call_later(_LINGER_SECONDS, self.transport.abort)
            return
        worker.clients.add(self)
        self.deadline = self.worker.loop.time() + self.worker.settings.header_timeout

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason makes no difference
        """Ends what runs for a client that is gone."""
        self._closing = True
        self.worker.clients.discard(self)
        self._pending.clear()
        self._forget_body()
        self._let_go(self._held)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.cancel()

    def eof_received(self) -> bool:
        """A client that sends no more is taken for gone, as its engine must not work for nobody."""
        return False

    def data_received(self, data: bytes) -> None:
        """Parses, and starts what is complete."""
        exchange = self.exchange
        if exchange is not None and exchange.tunnel:
            exchange.on_client_data(data)
            return
        if self._closing:
            self._discard(len(data))
            return
        if self._upgrading:
            self._keep_early(data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._on_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(error)
        if self._request is not None:
            self._watch_progress(len(data))
        if self.exchange is None:
            if self._pending:
                self._next()
        elif self._pending and not self._reading_paused:
            # Pipelined requests wait in memory: the client has to wait as well.
            self._reading_paused = True
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        """The client reads slowly: so does the router."""
        self.full = True
        self.full_since = self.worker.loop.time()
        if self.exchange is not None:
            self.exchange.on_client_full()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.full = False
        if self.exchange is not None:
            self.exchange.on_client_drained()

    # --- Parser callbacks ---

    def on_message_begin(self) -> None:
        """A request starts."""
        if self._synthetic:
            return
        self._request = Request(self.worker.loop.time())

    def on_url(self, url: bytes) -> None:
        """Its target, perhaps in pieces."""
        if not self._synthetic:
            self._request.target += url  # type: ignore[union-attr]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer once the head is complete."""
        request = self._request
        if request is None or self._synthetic:
            return
        if request.complete:
            self._count_trailer(request)
            return
        key = name.lower()
        code = HEADER_CODES.get(key)
        if code is None:
            request.lines += (name, b": ", value, b"\r\n")
        else:
            request.take_header(code, key, name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: refuse early what need not be read."""
        if self._synthetic:
            self._synthetic = False
            return
        request = self._request
        assert request is not None  # noqa: S101 - the parser has begun a message
        parser = self._parser
        request.finish_head(
            parser.get_method().decode(), parser.get_http_version(), upgrades=parser.should_upgrade()
        )
        request.complete = True
        if request.upgrade == b"websocket":
            self._check_upgrade(request)
        settings = self.worker.settings
        if sum(map(len, request.lines)) > settings.max_header_bytes:
            raise _headers_too_large(settings.max_header_bytes)
        if request.length > settings.max_body_bytes:
            raise self._too_large()
        self.worker.tenancy.identify(request)
        if request.refusal is not None and (request.length > _SMALL_BODY or request.chunked):
            raise request.refusal
        if self.worker.buffered + request.length > settings.max_buffered_bytes:
            raise _overloaded()
        request.size = 0
        if self.exchange is None and not self._pending:
            self._ask_for_body(request)

    def on_body(self, data: bytes) -> None:
        """A piece of its body."""
        request = self._request
        assert request is not None  # noqa: S101 - the parser has begun a message
        request.size += len(data)
        if request.size > self.worker.settings.max_body_bytes:
            raise self._too_large()
        # What has come counts, not what was announced: that would let a few idle clients use up the limit.
        request.held += len(data)
        self._held += len(data)
        self.worker.buffered += len(data)
        if self.worker.buffered > self.worker.settings.max_buffered_bytes:
            raise _overloaded()
        request.parts.append(data)

    def on_message_complete(self) -> None:
        """The request is whole."""
        request = self._request
        if request is None or (request.upgrades and request.upgrade != b"websocket"):
            return  # the body of a refused upgrade is still to come: see _on_upgrade
        self._request = None
        parts = request.parts
        if parts:
            request.body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
        self._pending.append(request)

    # --- Inside ---

    def _too_large(self) -> RequestError:
        limit = self.worker.settings.max_body_bytes
        return RequestError(413, f"the request body exceeds {limit} bytes", code="body_too_large")

    def _count_trailer(self, request: Request) -> None:
        request.nominated.append(b"")
        if len(request.nominated) > _MAX_TRAILERS:
            raise RequestError(431, f"more than {_MAX_TRAILERS} trailers", code="headers_too_large")

    def _on_upgrade(self, rest: bytes) -> None:
        """Goes on after a head with ``Upgrade``, where the parser stops.

        Only WebSocket is upgraded to. Any other offer (Java's HTTP client offers h2c with every request) is
        declined by answering in HTTP/1.1, so its body has to be read: a new parser gets the framing alone.
        """
        request = self._request
        if request is None:
            self._upgrading = True
            self._keep_early(rest)
            return
        request.upgrades = False
        self._parser = httptools.HttpRequestParser(self)
        framing = b"transfer-encoding: chunked" if request.chunked else b"content-length: %d" % request.length
        self._synthetic = True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\nhost: -\r\n" + framing + b"\r\n\r\n")
            if rest:
                self._parser.feed_data(rest)
        except httptools.HttpParserError as error:
            self._refuse(error)

    @staticmethod
    def _check_upgrade(request: Request) -> None:
        """Only a realtime path is upgraded; to others the offer means nothing, and a body is a body."""
        operation = OPERATIONS.get(request.path)
        if operation is None or operation.kind is not Kind.WEBSOCKET or request.method != b"GET":
            request.upgrade = b""
        elif request.length:
            raise RequestError(400, "a request to upgrade has no body", code="invalid_header")

    def _keep_early(self, data: bytes) -> None:
        """Keeps what a client sends ahead of the engine's 101: one that declines must never get it."""
        self._early += data
        if len(self._early) > _SMALL_BODY and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def take_early(self) -> bytes:
        """What came before the tunnel was open."""
        early, self._early = self._early, b""
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        return early

    def _refuse(self, error: Exception) -> None:
        """Queues the answer to a malformed request; nothing is read behind it."""
        cause = error.__context__
        if not isinstance(cause, RequestError):
            if cause is not None:
                raise cause
            if str(error) == "Data after `Connection: close`":
                self._closing = True
                return
            cause = RequestError(400, f"malformed HTTP: {error}", code="malformed_http")
        self._forget_body()
        self._pending.append(cause)

    def _let_go(self, size: int) -> None:
        """Bytes of request bodies that are no longer in memory."""
        self._held -= size
        self.worker.buffered -= size

    def _forget_body(self) -> None:
        if self._request is not None:
            self._let_go(self._request.held)
        self._request = None

    def _ask_for_body(self, request: Request) -> None:
        """It is a request's turn, and its body may still have to come."""
        self.deadline = request.received_at + self.worker.settings.body_timeout
        if request.expects_continue and not request.http10 and not request.size:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _watch_progress(self, size: int) -> None:
        """Bounds a request that isn't whole yet, also while an earlier one is still being answered."""
        request = self._request
        assert request is not None  # noqa: S101 - checked by the caller
        settings = self.worker.settings
        request.wire += size
        error = None
        if not request.complete:
            if self.exchange is None:
                self.deadline = request.received_at + settings.header_timeout
            if request.wire > settings.max_header_bytes:
                error = _headers_too_large(settings.max_header_bytes)
        elif request.wire > _MAX_FRAMING + _FRAMING_RATIO * request.size:
            # Trailers and extensions are gathered or skipped by the parser, and belong to no body.
            error = RequestError(400, "too much framing for so little body", code="malformed_http")
        if error is not None:
            self._closing = True
            self._forget_body()
            self._pending.append(error)

    def _next(self) -> None:
        """Starts the next request that waits parsed."""
        self.deadline = _NEVER
        entry = self._pending.popleft()
        if isinstance(entry, RequestError):
            self._closing = True
            self.respond_error(entry, keep_alive=False)
            return
        exchange = self.exchange = Exchange(self, entry)
        exchange.start()

    def exchange_done(self, *, keep_alive: bool) -> None:
        """The answer of the current request is written."""
        if self.exchange is not None:
            self._let_go(self.exchange.request.held)
        self.exchange = None
        if not keep_alive or self._closing:
            self.close_gracefully()
            return
        if self._pending:
            self.worker.loop.call_soon(self._resume_pipeline)
            return
        now = self.worker.loop.time()
        self.deadline = now + self.worker.settings.keepalive_timeout
        request = self._request
        if request is not None:
            # Its time begins only now: nobody read on while the answer before it was in the way.
            request.received_at = now
            if request.complete:
                self._ask_for_body(request)
            else:
                self.deadline = now + self.worker.settings.header_timeout

    def _resume_pipeline(self) -> None:
        if self.exchange is not None or self.transport.is_closing():
            return
        if self._pending:
            self._next()
        if self._reading_paused and not self._pending:
            self._reading_paused = False
            self.transport.resume_reading()

    def respond(
        self, status: int, headers: bytes, body: bytes, *, keep_alive: bool, head_only: bool = False
    ) -> None:
        """Writes an answer of the router's own. ``headers`` are whole lines."""
        connection = b"" if keep_alive else b"connection: close\r\n"
        self.transport.write(
            b"".join(
                (
                    status_line(status),
                    self.worker.date_line,
                    headers,
                    connection,
                    b"\r\n" if status == 204 else b"content-length: %d\r\n\r\n" % len(body),
                    b"" if head_only else body,
                )
            )
        )

    def respond_error(self, error: RequestError, *, keep_alive: bool) -> None:
        """Answers what never became an exchange."""
        self.worker.count_refused(error.status)
        headers = b"content-type: application/json\r\n" + error.extra_headers()
        self.respond(error.status, headers, error.body(), keep_alive=keep_alive)
        if not keep_alive:
            self.close_gracefully()

    def close_gracefully(self) -> None:
        """Closes once everything is written.

        What the client still sends is read for a while and dropped: a reset would take the answer from it.
        """
        self._closing = True
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.deadline = self.worker.loop.time() + _LINGER_SECONDS
        else:
            self.transport.close()

    def close_when_idle(self) -> None:
        """Ends a connection that carries no request; another one closes after its answer."""
        if self.exchange is None and self._request is None and not self._pending:
            self.transport.close()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _LINGER_BYTES:
            self.transport.abort()

    def sweep(self, now: float) -> None:
        """Ends what took too long; called when the deadline has passed or the client is slow."""
        if self.full and now - self.full_since > self.worker.settings.write_timeout:
            self.transport.abort()
            return
        if self.deadline > now or self.exchange is not None:
            return
        request = self._request
        if self._closing:
            self.transport.abort()
        elif request is None:
            self.transport.close()
        elif not request.complete:
            self._time_out("the request headers came too slowly")
        elif request.size < _MIN_BODY_RATE * (now - request.received_at):
            self._time_out("the request body came too slowly")

    def _time_out(self, message: str) -> None:
        self._forget_body()
        self._closing = True
        self.respond_error(RequestError(408, message, code="request_timeout"), keep_alive=False)


def _headers_too_large(limit: int) -> RequestError:
    return RequestError(431, f"headers exceed {limit} bytes", code="headers_too_large")


def _overloaded() -> RequestError:
    return RequestError(503, "too many request bodies in memory", code="overloaded", retry_after=1.0)


def format_peer(address: object) -> str:
    """A client's address for people."""
    match address:
        case (str() as host, int() as port, *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case _:
            return ""
