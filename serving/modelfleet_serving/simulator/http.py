"""A small HTTP/1.1 server on httptools, made to write to thousands of streams from one loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import parse_qsl

import httptools
import msgspec

SERVER: Final = "modelfleet-simulator"
MAX_BODY: Final = 64 * 2**20
MAX_PIPELINED: Final = 16
WRITE_LIMIT: Final = 4 * 2**20
"""Bytes that a reader may lag behind before its connection is dropped."""

_encode = msgspec.json.Encoder().encode


class Request:
    """A request, whole."""

    __slots__ = ("body", "headers", "keep_alive", "method", "path", "query")

    def __init__(
        self, method: str, target: bytes, headers: dict[str, str], body: bytes, keep_alive: bool
    ) -> None:
        url = httptools.parse_url(target)
        self.method = method
        self.path = url.path.decode("latin-1")
        self.query = dict(parse_qsl((url.query or b"").decode("latin-1")))
        self.headers = headers
        self.body = body
        self.keep_alive = keep_alive


class Exchange:
    """A request and the way to answer it: at once, or as a stream."""

    __slots__ = ("_protocol", "_request_id", "closed", "on_close", "request", "transport")

    def __init__(self, protocol: HttpProtocol, transport: asyncio.Transport, request: Request) -> None:
        self.request = request
        self.transport = transport
        self.closed = False
        """Answered, or the client is gone."""
        self.on_close: Callable[[], None] | None = None
        """Called when the client goes away before the answer is whole."""
        self._protocol = protocol
        self._request_id = request.headers.get("x-request-id", "")

    def send(
        self, status: int, body: Any = None, *, content_type: str = "application/json", headers: str = ""
    ) -> None:
        """Answers whole. A body that isn't bytes is written as JSON."""
        if self.closed:
            return
        content = b"" if body is None else body if isinstance(body, bytes) else _encode(body)
        head = self._head(
            status, f"content-type: {content_type}\r\ncontent-length: {len(content)}\r\n{headers}"
        )
        self.transport.write(head if self.request.method == "HEAD" else head + content)
        self._done()

    def start_stream(self, content_type: str = "text/event-stream; charset=utf-8") -> None:
        """Sends the head of a chunked answer; :meth:`write` and :meth:`end` follow."""
        self.transport.write(
            self._head(200, f"content-type: {content_type}\r\ntransfer-encoding: chunked\r\n")
        )

    def write(self, data: bytes) -> None:
        """Sends one chunk."""
        if not self.closed:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """Ends a chunked answer."""
        if not self.closed:
            self.transport.write(b"0\r\n\r\n")
            self._done()

    def reset(self) -> None:
        """Breaks the connection off."""
        self.transport.abort()

    def _head(self, status: int, headers: str) -> bytes:
        reason = HTTPStatus(status).phrase
        request_id = f"x-request-id: {self._request_id}\r\n" if self._request_id else ""
        connection = "" if self.request.keep_alive else "connection: close\r\n"
        head = f"HTTP/1.1 {status} {reason}\r\nserver: {SERVER}\r\n{request_id}{connection}{headers}\r\n"
        return head.encode("latin-1")

    def _done(self) -> None:
        self.closed = True
        self.on_close = None
        self._protocol.answered(self)


class HttpProtocol(asyncio.Protocol):
    """One connection: parses requests and hands them on, one after the other."""

    def __init__(self, handle: Callable[[Exchange], None], connections: set[HttpProtocol]) -> None:
        self._handle = handle
        self._connections = connections
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._current: Exchange | None = None
        self._pipelined: deque[Request] = deque()
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0
        self.lost = asyncio.Event()
        """The connection is gone."""

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_LIMIT)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The client is gone, or we let it go."""
        self._connections.discard(self)
        self._transport = None
        self.lost.set()
        exchange = self._current
        self._current = None
        if exchange is not None and not exchange.closed:
            exchange.closed = True
            if exchange.on_close is not None:
                exchange.on_close()

    def pause_writing(self) -> None:
        """A reader that stopped reading would make us keep everything in memory."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, and begins what it found once it is out of the parser's callbacks."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            status = 413 if self._size > MAX_BODY else 400
            if self._transport is not None:
                head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-length: 0\r\n"
                self._transport.write(head.encode() + b"connection: close\r\n\r\n")
                self._transport.close()
            return
        self._advance()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parses a request again without its offer of another protocol.

        The parser gives up behind the head of such a request, and takes it for one without a body.
        """
        offered = self._pipelined.pop()
        kept = {
            k: v for k, v in offered.headers.items() if k not in {"connection", "http2-settings", "upgrade"}
        }
        lines = [f"{offered.method} {self._target.decode('latin-1')} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in kept.items()]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received("\r\n".join([*lines, "", ""]).encode("latin-1") + rest)

    # --- httptools ---

    def on_message_begin(self) -> None:
        """A request begins."""
        self._target, self._headers, self._body, self._size = b"", {}, [], 0

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._headers.get("expect", "").lower() == "100-continue" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._size += len(body)
        if self._size > MAX_BODY:
            msg = f"body larger than {MAX_BODY} bytes"
            raise httptools.HttpParserError(msg)
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        request = Request(
            self._parser.get_method().decode("latin-1"),
            self._target,
            self._headers,
            b"".join(self._body),
            self._parser.should_keep_alive(),
        )
        self._pipelined.append(request)
        if len(self._pipelined) > MAX_PIPELINED and self._transport is not None:
            self._transport.abort()

    # --- requests in order ---

    def answered(self, exchange: Exchange) -> None:
        """An answer went out whole."""
        self._current = None
        if self._transport is None:
            return
        if not exchange.request.keep_alive:
            self._transport.close()
        else:
            self._advance()

    def close(self) -> None:
        """Ends the connection: what was written still goes out, an answer that isn't whole breaks off."""
        if self._transport is None:
            return
        if self._current is None:
            self._transport.close()
        else:
            self._transport.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _advance(self) -> None:
        if self._current is None and self._pipelined and self._transport is not None:
            self._current = Exchange(self, self._transport, self._pipelined.popleft())
            self._handle(self._current)
