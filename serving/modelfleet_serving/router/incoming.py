"""Reads requests from a client's bytes: parsed by llhttp, or recognised as what came before."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import httptools

from modelfleet_serving.router.api import OPERATIONS, Kind
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.known_heads import Curiosity, KnownRequest, pattern_of, worth_knowing
from modelfleet_serving.router.request import HEADER_CODES, Request
from modelfleet_serving.router.sending import ByteProtocol

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.transport import ByteTransport
    from modelfleet_serving.router.worker import Worker

_SMALL_BODY: Final = 64 * 1024
"""A refused request up to this size is read first: its connection stays usable."""
_MAX_TRAILERS: Final = 64
_MAX_FRAMING: Final = 1024 * 1024
_FRAMING_RATIO: Final = 16
"""Bytes on the wire for one of a body that may come in chunks of one byte, beyond the first MiB."""
_COPIED: Final = 8 * 1024
"""A body up to this size is cut out of what came with it: that costs less than a view of it."""
NEVER: Final = float("inf")


class RequestReader(ByteProtocol):
    """The reading half of a client's connection.

    Attributes:
        exchange: the request that is being answered.
        request: the request that is being read.
        pending: requests that are complete, or why one is refused, in the order in which they came.
        closing: nothing more is read.
        upgrading: a WebSocket is being asked for; what comes now is for the engine that agrees.
        reading_paused: the socket is not read for now.
        deadline: when what is awaited from the client must have come, in loop time.
    """

    __slots__ = (
        "_curiosity",
        "_early",
        "_held",
        "_known",
        "_left",
        "_parser",
        "_synthetic",
        "closing",
        "deadline",
        "exchange",
        "pending",
        "reading_paused",
        "request",
        "transport",
        "upgrading",
        "worker",
    )

    transport: ByteTransport

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.exchange: Exchange | None = None
        self.request: Request | None = None
        self.pending: deque[Request | RequestError] = deque()
        self.closing = False
        self.deadline = NEVER
        self._parser: Any = httptools.HttpRequestParser(self)
        self._held = 0
        self._synthetic = self.upgrading = False
        self._early = b""
        self.reading_paused = False
        self._left = 0  # bytes of the body of a request whose head was known
        self._known: KnownRequest | None = None
        self._curiosity = Curiosity()

    def feed(self, data: bytes) -> None:
        """Reads what a client has sent."""
        known = self._known
        try:
            if self._left:
                self._feed_body(data)
            elif self.request is not None or self.pending or self.exchange is not None:
                self._parse(data)
            elif known is not None and known.pattern.match(data) and self._begin_known(known):
                self._begin_body(data, known.pattern.end)
            else:
                self._parse(data)
                self._learn(data)
        except RequestError as error:
            self._refuse(error)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._on_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._on_parser_error(error)

    # --- Known heads ---

    def _begin_known(self, known: KnownRequest) -> bool:
        """Begins a request whose head came before, unless the answer to it would be another one now."""
        worker = self.worker
        length = known.pattern.length
        settings = worker.settings
        if (
            not length
            or length > settings.max_body_bytes
            or worker.buffered + length > settings.max_buffered_bytes
            or known.keys != worker.tenancy.generation
        ):
            self._known = None
            return False
        request = known.again(worker.now())
        self._curiosity.satisfied()
        self._left = length
        self.request = request
        self.deadline = request.received_at + settings.body_timeout
        return True

    def _begin_body(self, data: bytes, start: int) -> None:
        """Reads the body of a request whose head was known, from where that ended."""
        request = self.request
        if request is not None and len(data) - start == self._left > _COPIED:
            self._left = 0
            self._count_body(request, len(data) - start)
            request.take_body(data, start)
            self.on_message_complete()
        else:
            self._feed_body(data[start:])

    def _feed_body(self, data: bytes) -> None:
        """Reads the body of a request whose head was known, or more of it."""
        left = self._left - len(data)
        if left >= 0:
            self._left = left
            if data:
                self.on_body(data)
            if not left:
                self.on_message_complete()
            return
        self._left = 0
        self.on_body(data[:left])
        self.on_message_complete()
        self._parse(data[left:])

    def _learn(self, data: bytes) -> None:
        """Keeps the head of the request that ``data`` began with."""
        # Nothing waited before: the first that waits now is what the data began with, whatever follows it.
        request = self.pending[0] if self.pending else self.request
        if not isinstance(request, Request) or not worth_knowing(request) or not self._curiosity.piqued():
            return
        end = data.find(b"\r\n\r\n")
        pattern = pattern_of(data[: end + 4]) if end >= 0 else None
        if pattern is not None:
            self._known = KnownRequest(pattern, request, self.worker.tenancy.generation)

    def forget_done(self, request: Request) -> None:
        """The request is answered: nothing of its body stays."""
        self._let_go(request.held)
        request.held = 0
        request.body = b""

    # --- Parser callbacks ---

    def on_message_begin(self) -> None:
        """A request starts."""
        if self._synthetic:
            return
        self.request = Request(self.worker.now())

    def on_url(self, url: bytes) -> None:
        """Its target, perhaps in pieces."""
        if not self._synthetic:
            self.request.target += url  # type: ignore[union-attr]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer once the head is complete."""
        request = self.request
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
        request = self.request
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
        if self.exchange is None and not self.pending:
            self.ask_for_body(request)

    def on_body(self, data: bytes) -> None:
        """A piece of its body."""
        request = self.request
        assert request is not None  # noqa: S101 - the parser has begun a message
        self._count_body(request, len(data))
        request.parts.append(data)

    def _count_body(self, request: Request, size: int) -> None:
        request.size += size
        if request.size > self.worker.settings.max_body_bytes:
            raise self._too_large()
        # What has come counts, not what was announced: that would let a few idle clients use up the limit.
        request.held += size
        self._held += size
        self.worker.buffered += size
        if self.worker.buffered > self.worker.settings.max_buffered_bytes:
            raise _overloaded()

    def on_message_complete(self) -> None:
        """The request is whole."""
        request = self.request
        if request is None or (request.upgrades and request.upgrade != b"websocket"):
            return  # the body of a refused upgrade is still to come: see _on_upgrade
        self.request = None
        parts = request.parts
        if parts:
            request.body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
        self.pending.append(request)

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
        request = self.request
        if request is None:
            self.upgrading = True
            self.keep_early(rest)
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
            self._on_parser_error(error)

    @staticmethod
    def _check_upgrade(request: Request) -> None:
        """Only a realtime path is upgraded; to others the offer means nothing, and a body is a body."""
        operation = OPERATIONS.get(request.path)
        if operation is None or operation.kind is not Kind.WEBSOCKET or request.method != b"GET":
            request.upgrade = b""
        elif request.length:
            raise RequestError(400, "a request to upgrade has no body", code="invalid_header")

    def keep_early(self, data: bytes) -> None:
        """Keeps what a client sends ahead of the engine's 101: one that declines must never get it."""
        self._early += data
        if len(self._early) > _SMALL_BODY and not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()

    def take_early(self) -> bytes:
        """What came before the tunnel was open."""
        early, self._early = self._early, b""
        if self.reading_paused:
            self.reading_paused = False
            self.transport.resume_reading()
        return early

    def _on_parser_error(self, error: Exception) -> None:
        cause = error.__context__
        if not isinstance(cause, RequestError):
            if cause is not None:
                raise cause
            if str(error) == "Data after `Connection: close`":
                self.closing = True
                return
            cause = RequestError(400, f"malformed HTTP: {error}", code="malformed_http")
        self._refuse(cause)

    def _refuse(self, error: RequestError) -> None:
        """Queues the answer to a malformed request; nothing is read behind it."""
        self._left = 0
        self.forget_body()
        self.pending.append(error)

    def _let_go(self, size: int) -> None:
        """Bytes of request bodies that are no longer in memory."""
        self._held -= size
        self.worker.buffered -= size

    def forget_body(self) -> None:
        """Drops the request that is being read."""
        if self.request is not None:
            self._let_go(self.request.held)
        self.request = None

    def forget_parser(self) -> None:
        """Nothing comes any more. The two know each other, and nothing is to wait for the collector."""
        self._parser = None

    def ask_for_body(self, request: Request) -> None:
        """It is a request's turn, and its body may still have to come."""
        self.deadline = request.received_at + self.worker.settings.body_timeout
        if request.expects_continue and not request.http10 and not request.size:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def watch_progress(self, size: int) -> None:
        """Bounds a request that isn't whole yet, also while an earlier one is still being answered."""
        request = self.request
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
            self.closing = True
            self._refuse(error)


def _headers_too_large(limit: int) -> RequestError:
    return RequestError(431, f"headers exceed {limit} bytes", code="headers_too_large")


def _overloaded() -> RequestError:
    return RequestError(503, "too many request bodies in memory", code="overloaded", retry_after=1.0)
