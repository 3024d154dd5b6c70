"""Connections to engines: opened, kept, reused, closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

from modelfleet_serving.router.opening import Opening, family_of
from modelfleet_serving.router.response import FramingError, ResponseHead
from modelfleet_serving.router.sending import ByteProtocol
from modelfleet_serving.router.sockets import connect
from modelfleet_serving.router.tls import engine_context
from modelfleet_serving.router.transport import SocketTransport

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.poller import SocketPoller
    from modelfleet_serving.router.relay import Relay
    from modelfleet_serving.router.table import EndpointRef
    from modelfleet_serving.router.transport import ByteTransport

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 256 * 1024


class UpstreamConnection(ByteProtocol):
    """One connection to an engine: a protocol of asyncio. Carries one request at a time.

    Attributes:
        exchange: the request that it carries, or ``None`` while it is idle.
        relay: takes the bytes of an answer's body; set by the exchange once it has the head.
        reused: it has carried a request before: the engine may close it just when another one is sent.
        stays: the engine keeps it open after the current answer.
    """

    __slots__ = (
        "_buffer",
        "endpoint",
        "exchange",
        "idle_since",
        "paused",
        "relay",
        "reused",
        "stays",
        "transport",
    )

    transport: ByteTransport

    def __init__(self, endpoint: EndpointRef) -> None:
        self.endpoint = endpoint
        self.exchange: Exchange | None = None
        self.relay: Relay | None = None
        self.reused = False
        self.stays = True
        self.paused = False
        self.idle_since = 0.0
        self._buffer = b""

    def connection_made(self, transport: ByteTransport) -> None:
        """Keeps the transport."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Passes an answer on."""
        exchange = self.exchange
        if exchange is None:
            # An answer nobody asked for, such as uvicorn's 408 before it closes: not to be reused.
            self.transport.abort()
            return
        try:
            relay = self.relay
            if relay is not None:
                relay.feed(data)
            else:
                self._head(exchange, data)
        except FramingError as error:
            exchange.on_upstream_lost(f"broke HTTP/1.1: {error}")
            self.transport.abort()

    def _head(self, exchange: Exchange, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        answers = self.endpoint.answers
        known = answers.find(data)
        if known is not None:
            head, end = known
            exchange.on_response(self, head, data[end:])
            return
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise FramingError(f"the head exceeds {MAX_HEAD_BYTES} bytes")
                self._buffer = data
                return
            head = ResponseHead(data[:end])
            answers.learn(data[: end + 4], head)
            data = data[end + 4 :]
            if head.status >= 200 or head.status == 101:
                if head.status == 101 and not exchange.request.upgrades:
                    raise FramingError("it switches protocols unasked")
                exchange.on_response(self, head, data)
                return

    def eof_received(self) -> bool:
        """Lets the transport close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the exchange, or leaves the pool."""
        exchange = self.exchange
        if exchange is not None:
            exchange.on_upstream_closed(self, str(exc) if exc else "closed the connection")
            return
        with contextlib.suppress(ValueError):
            self.endpoint.idle.remove(self)

    def pause_writing(self) -> None:
        """The engine reads slowly: a tunnel stops reading from the client."""
        if self.exchange is not None:
            self.exchange.on_upstream_full()

    def resume_writing(self) -> None:
        """The engine has caught up."""
        if self.exchange is not None:
            self.exchange.on_upstream_drained()

    def pause(self) -> None:
        """Stops reading the answer while the client is slow."""
        if not self.paused and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Goes on reading the answer."""
        if self.paused and not self.transport.is_closing():
            self.paused = False
            self.transport.resume_reading()


class Connector:
    """Opens connections and bounds the idle ones."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        poller: SocketPoller,
        *,
        connect_timeout: float,
        idle_limit: int,
        idle_timeout: float,
        authority: str = "",
    ) -> None:
        """``authority``: file of the certificates that engines' must be signed by; empty for the system's."""
        self._loop = loop
        self._now: Callable[[], float] = loop.time
        self._poller = poller
        self._connect_timeout = connect_timeout
        self._idle_limit = idle_limit
        self._idle_timeout = idle_timeout
        self._authority = authority
        self._tls: ssl.SSLContext | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._openings: set[Opening] = set()
        self._pools: set[EndpointRef] = set()

    def open(self, endpoint: EndpointRef, exchange: Exchange) -> None:
        """Opens a connection for an exchange, which is told of the outcome: of a failure, later."""
        family = 0 if endpoint.tls else family_of(endpoint.host)
        if not family:
            task = self._loop.create_task(self._open(endpoint, exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return

        def tell(connected: socket.socket | None, reason: str) -> None:
            self._openings.discard(opening)
            if connected is None:
                exchange.on_connect_failed(endpoint, f"no connection: {reason}")
                return
            connection = UpstreamConnection(endpoint)
            try:
                SocketTransport(self._loop, self._poller, connected, connection)
            except OSError as error:  # it was gone before it was taken
                connected.close()
                self._loop.call_soon(exchange.on_connect_failed, endpoint, f"no connection: {error}")
                return
            self._opened(connection, exchange)

        opening = Opening(
            self._loop, self._poller, family, (endpoint.host, endpoint.port), self._connect_timeout, tell
        )
        self._openings.add(opening)
        opening.start()

    def _opened(self, connection: UpstreamConnection, exchange: Exchange) -> None:
        if not exchange.on_connected(connection.endpoint, connection):
            self.keep(connection)

    async def _open(self, endpoint: EndpointRef, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = UpstreamConnection(endpoint)
                host, port = endpoint.host, endpoint.port
                if endpoint.tls:
                    await self._loop.create_connection(
                        lambda: cast("asyncio.BaseProtocol", connection),
                        host,
                        port,
                        ssl=self.tls(),
                        server_hostname=host,
                    )
                else:
                    await connect(self._loop, self._poller, host, port, connection)
        except TimeoutError:
            exchange.on_connect_failed(endpoint, f"no connection within {self._connect_timeout:g} s")
        except (OSError, ValueError) as error:  # ValueError: a name that the resolver can't encode
            exchange.on_connect_failed(endpoint, f"no connection: {error}")
        else:
            self._opened(connection, exchange)

    def tls(self) -> ssl.SSLContext:
        """The context of connections to engines behind https."""
        if self._tls is None:
            self._tls = engine_context(self._authority)
        return self._tls

    def keep(self, connection: UpstreamConnection) -> None:
        """Puts a connection whose answer is whole back for the next request."""
        endpoint = connection.endpoint
        connection.exchange = None
        connection.relay = None
        idle = endpoint.idle
        transport = connection.transport
        # An engine may answer before it has read the request: the rest of that is still on its way.
        if len(idle) >= self._idle_limit or transport.is_closing() or transport.get_write_buffer_size():
            connection.transport.abort()
            return
        connection.resume()
        connection.reused = True
        connection.idle_since = self._now()
        if not idle:
            self._pools.add(endpoint)
        idle.append(connection)

    def sweep(self, now: float) -> None:
        """Closes connections that were idle for too long: the oldest stand first."""
        limit = now - self._idle_timeout
        for endpoint in list(self._pools):
            idle = endpoint.idle
            while idle and idle[0].idle_since < limit:
                idle.pop(0).transport.abort()
            if not idle:
                self._pools.discard(endpoint)

    def drop(self, endpoint: EndpointRef) -> None:
        """Closes the idle connections of an endpoint that is gone."""
        self._pools.discard(endpoint)
        while endpoint.idle:
            endpoint.idle.pop().transport.abort()

    async def close(self) -> None:
        """Closes everything that is idle or just being opened."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._openings:
            self._openings.pop().cancel()
        for endpoint in list(self._pools):
            self.drop(endpoint)
