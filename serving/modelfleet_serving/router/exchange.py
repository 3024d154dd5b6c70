"""One request's life: find its model, choose an engine, send, pass the answer on, account for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from modelfleet_serving.router import builtin, failover
from modelfleet_serving.router.admission import admit, read_options
from modelfleet_serving.router.affinity import Fingerprint, readable_bytes
from modelfleet_serving.router.api import OPERATIONS, Kind, Operation, find_operation
from modelfleet_serving.router.digits import write_digits
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.health import Failure
from modelfleet_serving.router.relay import TunnelRelay
from modelfleet_serving.router.reply import Reply
from modelfleet_serving.router.request import MAX_REQUEST_ID
from modelfleet_serving.router.routing import find_target
from modelfleet_serving.router.stored import find_stored
from modelfleet_serving.router.table import EndpointRef, Target, VariantRef

if TYPE_CHECKING:
    from modelfleet_serving.router.holding import Ticket
    from modelfleet_serving.router.peek import Peek
    from modelfleet_serving.router.request import Request
    from modelfleet_serving.router.response import ResponseHead
    from modelfleet_serving.router.server import ClientConnection
    from modelfleet_serving.router.tenants import Lease, Tenant
    from modelfleet_serving.router.upstream import UpstreamConnection

_NEVER: Final = math.inf
_STORED: Final = Kind.STORED  # looked up once, as in routing
_JOIN_LIMIT: Final = 64 * 1024
"""Bytes of a body that are cheaper copied behind the head than sent as a piece of their own."""
_RETRIED_STATUSES: Final = frozenset({500, 502, 503, 504})


class Exchange:
    """A request and its answer.

    Attributes:
        target: what its model name stands for; set once it is ``routed``.
        order: the variants that may serve it, the chosen one first.
        fresh_retry: the engine closed an idle connection under it, and a new one is tried.
        fallback_from: the chosen variant, where another one serves it.
        holder: the engine that keeps the response which it names.
        endpoint: the engine it is counted on.
        tried: engines that failed it.
        deadline: when the current wait is over, in loop time.
        expires: when the client's own deadline is over.
        next_comment: when a client that asked for signs of life gets one.
        tunnel: bytes pass both ways unread (WebSocket).
        salt: keeps tenants' prompts apart; the tenant's name.
        readable: bytes of its body, images and audio at their weight for an engine.
    """

    __slots__ = (
        "attempts",
        "body",
        "client",
        "deadline",
        "endpoint",
        "expires",
        "fallback_from",
        "finished",
        "fresh_retry",
        "holder",
        "keep_alive_seconds",
        "lease",
        "next_comment",
        "operation",
        "order",
        "peek",
        "prompt",
        "prompt_read",
        "readable",
        "reading",
        "reply",
        "request",
        "request_id",
        "routed",
        "salt",
        "session",
        "span",
        "started",
        "strip_usage",
        "target",
        "tenant",
        "ticket",
        "tried",
        "tunnel",
        "upstream",
        "waits_since",
        "worker",
    )

    operation: Operation
    target: Target
    waits_since: float

    def __init__(self, client: ClientConnection, request: Request) -> None:
        self.client = client
        self.worker = client.worker
        self.request = request
        given = request.special.get(b"x-request-id", b"") if request.steered else b""
        self.request_id = given if 0 < len(given) <= MAX_REQUEST_ID else self.worker.next_request_id()
        self.started = request.received_at
        self.routed = self.finished = self.tunnel = self.prompt_read = self.strip_usage = False
        self.fresh_retry = False
        self.body: bytes | memoryview = b""
        self.order: tuple[VariantRef, ...] = ()
        self.tried: list[EndpointRef] = []
        self.attempts = self.reading = self.readable = 0
        self.deadline = self.expires = self.next_comment = _NEVER
        self.keep_alive_seconds = 0.0
        self.salt = ""
        self.tenant: Tenant | None = request.tenant
        self.lease: Lease | None = None
        self.ticket: Ticket[Exchange] | None = None
        self.session: int | None = None
        self.prompt: Fingerprint | None = None
        self.peek: Peek | None = None
        self.reply: Reply | None = None
        self.endpoint: EndpointRef | None = None
        self.holder: EndpointRef | None = None
        self.upstream: UpstreamConnection | None = None
        self.fallback_from: str | None = None
        self.span: Any = None

    # --- From request to engine ---

    def start(self) -> None:
        """Routes the request, or answers it here."""
        request = self.request
        worker = self.worker
        try:
            operation = OPERATIONS.get(request.path) or find_operation(request.path)
            if worker.tracing is not None and operation is not None:
                self.span = worker.tracing.begin(self)
            if request.refusal is not None:
                raise request.refusal
            if operation is None or request.method == b"OPTIONS":
                builtin.answer(self)
                return
            self.operation = operation
            if request.method != b"POST" or operation.kind is _STORED:
                builtin.check_method(request, operation)
            if operation.kind is _STORED:
                self.holder = find_stored(self)
                self.target = worker.table.resolve(self.holder.variant.model.name)
            else:
                self.target = find_target(self)
            self.routed = True
            self.readable = readable_bytes(request.data, request.start)
            if request.steered:
                read_options(self)
            if self.tenant is not None:
                admit(self, self.tenant)
            self.body = request.payload
            worker.active.add(self)
            if operation.kind is _STORED and self.holder is not None:
                worker.dispatcher.assign(self, self.holder)
            else:
                worker.dispatcher.dispatch(self)
        except RequestError as error:
            self.fail(error)

    def run_on(self, endpoint: EndpointRef) -> None:
        """Sends the request to an engine that the dispatcher has chosen and counted it on."""
        self.attempts += 1
        self.endpoint = endpoint
        self.deadline = self.expires
        idle = endpoint.idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                self._send(connection)
                return
        self.worker.connector.open(endpoint, self)

    def on_connected(self, endpoint: EndpointRef, connection: UpstreamConnection) -> bool:
        """Takes the connection opened for it; False when it has no use for it any more."""
        if self.endpoint is not endpoint or self.upstream is not None or self.finished:
            return False
        self._send(connection)
        return True

    def on_connect_failed(self, endpoint: EndpointRef, reason: str) -> None:
        """The engine can't be reached."""
        if self.endpoint is endpoint and self.upstream is None and not self.finished:
            failover.attempt_failed(self, reason, Failure.CONNECT, 503)

    def _send(self, connection: UpstreamConnection) -> None:
        worker = self.worker
        self.upstream = connection
        connection.exchange = self
        deadline = worker.now() + worker.settings.first_byte_timeout
        self.deadline = min(deadline, self.expires)
        request = self.request
        body = self.body
        endpoint = connection.endpoint
        if request.upgrades:
            framing = b"connection: upgrade\r\nupgrade: websocket\r\nx-request-id: "
        else:
            framing = b"".join((b"content-length: ", write_digits(len(body)), b"\r\nx-request-id: "))
        head = [
            request.method,
            b" ",
            endpoint.path,
            request.target,
            endpoint.request_tail,
            request.joined or b"".join(request.lines),
            worker.forwarded_headers(self),
            framing,
            self.request_id,
            b"\r\n\r\n",
        ]
        if isinstance(body, bytes) and len(body) <= _JOIN_LIMIT:
            head.append(body)
            connection.transport.write(b"".join(head))
        else:
            pieces: list[bytes | memoryview] = [b"".join(head), body]
            connection.transport.writelines(pieces)

    # --- From engine to client ---

    @property
    def began(self) -> bool:
        """The client has got bytes of an engine's answer: nothing can be tried anew."""
        reply = self.reply
        return reply is not None and reply.first_byte is not None

    def on_response(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        """The engine's answer begins."""
        worker = self.worker
        endpoint = connection.endpoint
        if self.began and (head.status != 200 or not head.events):
            failover.did_not_go_on(self, connection, head.status)
            return
        if head.status in _RETRIED_STATUSES:
            worker.dispatcher.failed(endpoint, Failure.STATUS)
            if failover.try_elsewhere(self, connection, head.status):
                return
        else:
            worker.dispatcher.succeeded(endpoint, worker.now())
        worker.dispatcher.begun(self, endpoint)
        self.deadline = self.expires
        reply = self.reply
        if reply is None:
            reply = self.reply = Reply(self)
        reply.begin(connection, head, rest)
        if self.client.full and self.upstream is not None:
            self.upstream.pause()

    def answered(self, *, reusable: bool) -> None:
        """The engine's answer is passed on whole."""
        connection = self.upstream
        if connection is not None:
            self.upstream = None
            if reusable and connection.stays:
                self.worker.connector.keep(connection)
            else:
                connection.exchange = None
                connection.transport.abort()
        self.finish()

    def client_stays(self) -> bool:
        """The client's connection may carry another request."""
        return self.request.keep_alive and not self.worker.draining

    # --- Failures ---

    def on_upstream_closed(self, connection: UpstreamConnection, reason: str) -> None:
        """The engine's connection is gone."""
        reply = self.reply
        if (
            reply is not None
            and connection.relay is not None
            and reply.relay is not None
            and reply.relay.eof()
        ):
            return
        if self.tunnel:
            connection.exchange = None
            self.upstream = None
            self.client.transport.close()
            self._account()
            return
        failover.lost(self, connection, reason)

    def on_upstream_lost(self, reason: str) -> None:
        """The engine answers what can't be passed on."""
        if self.upstream is not None:
            failover.lost(self, self.upstream, reason, broken=True)

    def detach(self, connection: UpstreamConnection) -> None:
        """Gives up an engine's connection, and the engine's work with it."""
        connection.exchange = None
        self.upstream = None
        connection.transport.abort()

    def fail(self, error: RequestError) -> None:
        """Answers with an error of the router's own."""
        if self.finished:
            return
        reply = self.reply
        if reply is not None and (reply.opened or reply.first_byte is not None):
            failover.cut_off(self, self.upstream, error)
            return
        operation = find_operation(self.request.path)
        headers = b"content-type: application/json\r\n" + error.extra_headers()
        body = error.body(anthropic=operation is not None and operation.anthropic)
        self.answer(error.status, headers, body)

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Answers here, without an engine."""
        if self.reply is None:
            self.reply = Reply(self)
        self.reply.status = status
        request = self.request
        if self.worker.cors:
            headers += self.worker.cors_headers(request)
        headers += b"x-request-id: " + self.request_id + b"\r\n"
        keep_alive = self.client_stays()
        if request.http10 and keep_alive:
            headers += b"connection: keep-alive\r\n"
        request.keep_alive = keep_alive
        self.client.respond(status, headers, body, keep_alive=keep_alive, head_only=request.method == b"HEAD")
        self.finish()

    # --- Time ---

    def idle_since(self) -> float:
        """Loop time of the last byte of an answer that has begun and isn't held up by its client."""
        reply = self.reply
        if reply is None or reply.first_byte is None or self.client.full or self.tunnel:
            return _NEVER
        return reply.written_at

    def comfort(self, now: float) -> bool:
        """Sends a comment to a client that asked for signs of life; False when it can't get any more.

        While it waits for an engine, while that reads the prompt, and in any longer silence of a stream.
        """
        reply = self.reply
        if self.finished or (reply is not None and not reply.takes_comments):
            return False
        if reply is not None:
            self.next_comment = max(self.next_comment, reply.written_at + self.keep_alive_seconds)
        if now >= self.next_comment and not self.client.full:
            self.next_comment = now + self.keep_alive_seconds
            if reply is None:
                reply = self.reply = Reply(self)
                reply.open()
            reply.comment(b"waiting")
        return True

    # --- Flow control and tunnels ---

    def on_client_full(self) -> None:
        """The client reads slowly."""
        if self.upstream is not None:
            self.upstream.pause()

    def on_client_drained(self) -> None:
        """The client has caught up."""
        if self.reply is not None:
            self.reply.await_next()
        if self.upstream is not None:
            self.upstream.resume()

    def on_upstream_full(self) -> None:
        """The engine reads slowly; only a tunnel can do something about it."""
        if self.tunnel:
            self.client.transport.pause_reading()

    def on_upstream_drained(self) -> None:
        """The engine has caught up."""
        if self.tunnel:
            self.client.transport.resume_reading()

    def open_tunnel(self, connection: UpstreamConnection, start: bytes) -> None:
        """Lets bytes pass both ways from now on."""
        self.tunnel = True
        self.request.keep_alive = False
        self.client.transport.write(start)
        connection.relay = TunnelRelay(self.client.transport)
        early = self.client.take_early()
        if early:
            connection.transport.write(early)

    def on_client_data(self, data: bytes) -> None:
        """Bytes for the engine, in a tunnel."""
        if self.upstream is not None:
            self.upstream.transport.write(data)

    # --- The end ---

    def cancel(self) -> None:
        """The client is gone: so is the engine's work for it."""
        if self.finished:
            return
        if self.upstream is not None:
            self.detach(self.upstream)
        elif self.ticket is not None:
            self.worker.dispatcher.waiting.forget(self)
        if self.reply is None:
            self.reply = Reply(self)
        self.reply.status = self.reply.status if self.tunnel else 499
        self._account()

    def give_up(self) -> None:
        """The router ends before the request: its client is told."""
        if self.finished:
            return
        if self.ticket is not None:
            self.worker.dispatcher.waiting.forget(self)
        error = RequestError(503, "the router is shutting down", code="shutting_down", retry_after=1.0)
        if self.upstream is not None and not self.began:
            self.detach(self.upstream)
        self.fail(error)

    def release(self) -> None:
        """Takes the request off its engine's count."""
        endpoint = self.endpoint
        if endpoint is not None:
            self.endpoint = None
            self.worker.dispatcher.released(self, endpoint)

    def finish(self) -> None:
        """Accounts for the request and lets its client's connection go on."""
        self._account()
        client = self.client
        if client.exchange is self:
            client.exchange_done(keep_alive=self.client_stays() and not self.request.upgrades)

    def _account(self) -> None:
        if self.finished:
            return
        self.finished = True
        worker = self.worker
        worker.active.discard(self)
        worker.count(self)
        self.release()
        reply = self.reply
        if reply is not None:
            # Exchange, reply and relay know each other: parted, they and the body go at once, not when the
            # collector comes by, and the next request gets their memory while it is in the processor's cache.
            reply.close()
            self.reply = None
