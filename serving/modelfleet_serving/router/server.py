"""The client's side: HTTP/1.1 in, one request at a time, answers out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.errors import RequestError, status_line
from modelfleet_serving.router.exchange import Exchange
from modelfleet_serving.router.incoming import NEVER, RequestReader

if TYPE_CHECKING:
    from modelfleet_serving.router.transport import ByteTransport
    from modelfleet_serving.router.worker import Worker

_log = logging.getLogger(__name__)

WRITE_HIGH_WATER: Final = 256 * 1024
_LINGER_BYTES: Final = 4 * 1024 * 1024
_LINGER_SECONDS: Final = 2.0
_MIN_BODY_RATE: Final = 1024.0


class ClientConnection(RequestReader):
    """One client connection: a protocol of asyncio.

    Requests are answered in order; of a pipelining client the further ones wait parsed. While a request runs
    the socket is still read, since only so a client that leaves is noticed at once.
    """

    __slots__ = ("_discarded", "full", "full_since", "peer")

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.full = False
        self.full_since = 0.0
        self.peer = ""
        self._discarded = 0

    # --- Transport callbacks ---

    def connection_made(self, transport: ByteTransport) -> None:
        """Takes a new connection."""
        self.transport = transport
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
        self.deadline = self.worker.now() + self.worker.settings.header_timeout

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the reason makes no difference
        """Ends what runs for a client that is gone."""
        self.closing = True
        self.worker.clients.discard(self)
        self.pending.clear()
        self.forget_body()
        self._let_go(self._held)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.cancel()
        self.forget_parser()

    def eof_received(self) -> bool:
        """A client that sends no more is taken for gone, as its engine must not work for nobody."""
        return False

    def data_received(self, data: bytes) -> None:
        """Parses, and starts what is complete."""
        exchange = self.exchange
        if exchange is not None and exchange.tunnel:
            exchange.on_client_data(data)
            return
        if self.closing:
            self._discard(len(data))
            return
        if self.upgrading:
            self.keep_early(data)
            return
        self.feed(data)
        if self.request is not None:
            self.watch_progress(len(data))
        if self.exchange is None:
            if self.pending:
                self._next()
        elif self.pending and not self.reading_paused:
            # Pipelined requests wait in memory: the client has to wait as well.
            self.reading_paused = True
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        """The client reads slowly: so does the router."""
        self.full = True
        self.full_since = self.worker.now()
        if self.exchange is not None:
            self.exchange.on_client_full()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.full = False
        if self.exchange is not None:
            self.exchange.on_client_drained()

    def _next(self) -> None:
        """Starts the next request that waits parsed."""
        self.deadline = NEVER
        entry = self.pending.popleft()
        if isinstance(entry, RequestError):
            self.closing = True
            self.respond_error(entry, keep_alive=False)
            return
        exchange = self.exchange = Exchange(self, entry)
        exchange.start()

    def exchange_done(self, *, keep_alive: bool) -> None:
        """The answer of the current request is written."""
        if self.exchange is not None:
            self.forget_done(self.exchange.request)
        self.exchange = None
        if not keep_alive or self.closing:
            self.close_gracefully()
            return
        if self.pending:
            self.worker.loop.call_soon(self._resume_pipeline)
            return
        now = self.worker.now()
        self.deadline = now + self.worker.settings.keepalive_timeout
        request = self.request
        if request is not None:
            # Its time begins only now: nobody read on while the answer before it was in the way.
            request.received_at = now
            if request.complete:
                self.ask_for_body(request)
            else:
                self.deadline = now + self.worker.settings.header_timeout

    def _resume_pipeline(self) -> None:
        if self.exchange is not None or self.transport.is_closing():
            return
        if self.pending:
            self._next()
        if self.reading_paused and not self.pending:
            self.reading_paused = False
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
        self.closing = True
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.deadline = self.worker.now() + _LINGER_SECONDS
        else:
            self.transport.close()

    def close_when_idle(self) -> None:
        """Ends a connection that carries no request; another one closes after its answer."""
        if self.exchange is None and self.request is None and not self.pending:
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
        request = self.request
        if self.closing:
            self.transport.abort()
        elif request is None:
            self.transport.close()
        elif not request.complete:
            self._time_out("the request headers came too slowly")
        elif request.size < _MIN_BODY_RATE * (now - request.received_at):
            self._time_out("the request body came too slowly")

    def _time_out(self, message: str) -> None:
        self.forget_body()
        self.closing = True
        self.respond_error(RequestError(408, message, code="request_timeout"), keep_alive=False)


def format_peer(address: object) -> str:
    """A client's address for people."""
    match address:
        case (str() as host, int() as port, *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case _:
            return ""
