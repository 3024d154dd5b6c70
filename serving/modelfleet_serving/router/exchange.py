"""One request's life: find its model, choose an engine, send, relay the answer, account for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from modelfleet_serving.contract import HEADER_FALLBACK
from modelfleet_serving.router import builtin
from modelfleet_serving.router.affinity import Fingerprint
from modelfleet_serving.router.api import OPERATIONS, Kind, Operation
from modelfleet_serving.router.body import Peek, multipart_model, peek_json, replace_model
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.relay import ChunkedRelay, EventRelay, PlainRelay, SizedRelay, frame
from modelfleet_serving.router.response import ResponseHead
from modelfleet_serving.router.table import EndpointRef, Target, VariantRef
from modelfleet_serving.router.usage import KEY as USAGE_KEY
from modelfleet_serving.router.usage import read_usage

if TYPE_CHECKING:
    from modelfleet_serving.router.request import Request
    from modelfleet_serving.router.server import ClientConnection
    from modelfleet_serving.router.upstream import UpstreamConnection

_NEVER: Final = float("inf")
_JOIN_LIMIT: Final = 64 * 1024
_RETRIED_STATUSES: Final = frozenset({500, 502, 503, 504})


class Exchange:
    """A request and its answer.

    Attributes:
        target: what its model name stands for; set once it is ``routed``.
        order: the variants that may serve it, the chosen one first.
        fallback_from: the chosen variant, where another one serves it.
        endpoint: the engine it is counted on.
        tried: engines that failed it.
        deadline: when the current wait is over, in loop time.
        expires: when the client's own deadline is over.
        began: the client has got the first bytes of an answer: nothing can be tried anew.
        tunnel: bytes pass both ways unread (WebSocket).
    """

    __slots__ = (
        "_chunk_time",
        "_fresh_retry",
        "_relay",
        "_status",
        "_usage",
        "attempts",
        "began",
        "client",
        "deadline",
        "endpoint",
        "events",
        "expires",
        "fallback_from",
        "first_byte",
        "input_tokens",
        "operation",
        "order",
        "output_tokens",
        "peek",
        "prompt",
        "prompt_read",
        "reading",
        "request",
        "request_id",
        "routed",
        "salt",
        "sent_at",
        "session",
        "span",
        "started",
        "target",
        "tried",
        "tunnel",
        "upstream",
        "worker",
    )

    operation: Operation
    target: Target

    def __init__(self, client: ClientConnection, request: Request) -> None:
        self.client = client
        self.worker = client.worker
        self.request = request
        self.endpoint: EndpointRef | None = None
        self.upstream: UpstreamConnection | None = None
        self.fallback_from: str | None = None
        self.tried: list[EndpointRef] = []
        self.attempts = 0
        self.began = self.events = self.tunnel = self.prompt_read = False
        self.routed = False
        self.first_byte: float | None = None
        self.input_tokens = self.output_tokens = 0
        self.span: Any = None
        self._usage = b""
        self.order: tuple[VariantRef, ...] = ()
        self.peek: Peek | None = None
        self.prompt: Fingerprint | None = None
        self.session: int | None = None
        self.salt = ""
        self.reading = 0
        self.deadline = self.expires = _NEVER
        self.started = request.received_at
        self.sent_at = 0.0
        self._status = 0
        self._fresh_retry = False
        self._chunk_time = 0.0
        self._relay: SizedRelay | ChunkedRelay | PlainRelay | EventRelay | None = None
        self.request_id = request.special.get(b"x-request-id") or b""

    # --- From request to engine ---

    def start(self) -> None:
        """Routes the request, or answers it here."""
        request = self.request
        if not self.request_id:
            self.request_id = self.worker.next_request_id()
        try:
            operation = OPERATIONS.get(request.path)
            if operation is None or request.method == b"OPTIONS":
                builtin.answer(self)
                return
            self.operation = operation
            if request.method != b"POST":
                builtin.check_method(request, operation)
            self.target = self._find_target(operation)
            self.routed = True
            if self.worker.tracing is not None:
                self.span = self.worker.tracing.begin(self)
            timeout = request.text("x-modelfleet-timeout")
            if timeout is not None:
                self.expires = self.started + _parse_timeout(timeout)
            self.worker.active.add(self)
            self.worker.dispatcher.dispatch(self)
        except RequestError as error:
            self.fail(error)

    def _find_target(self, operation: Operation) -> Target:
        request = self.request
        table = self.worker.table
        span: tuple[int, int] | None = None
        if operation.kind is Kind.MULTIPART:
            span = multipart_model(request.body, request.special.get(b"content-type", b""))
            name: str | None = request.body[span[0] : span[1]].decode("utf-8", "replace")
        elif operation.kind is Kind.WEBSOCKET:
            name = builtin.query_value(request.query, b"model") or request.text("x-modelfleet-model")
        else:
            self.peek = peek_json(request.body)
            name = self.peek.model
        if not name:
            raise RequestError(400, "you must provide a model parameter", code="missing_model", param="model")
        target = table.resolve(name)
        pin = request.text("x-modelfleet-variant")
        if pin is not None:
            if target.pin is not None and target.pin != pin:
                message = f"the model names variant {target.pin!r}, the header {pin!r}"
                raise RequestError(400, message, code="variant_conflict", param="model")
            target = target.pinned(pin)
        if target.name != name and operation.kind is not Kind.WEBSOCKET:
            if span is not None:
                request.body = b"".join(
                    (request.body[: span[0]], target.name.encode(), request.body[span[1] :])
                )
            else:
                request.body = replace_model(request.body, target.name)
        return target

    def run_on(self, endpoint: EndpointRef) -> None:
        """Sends the request to an engine that the dispatcher has chosen and counted it on."""
        self.attempts += 1
        self.endpoint = endpoint
        self.deadline = _NEVER
        idle = endpoint.idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                self._send(connection)
                return
        self.worker.connector.open(endpoint, self)

    def on_connected(self, endpoint: EndpointRef, connection: UpstreamConnection) -> bool:
        """Takes the connection opened for it; False when it has no use for it any more."""
        if self.endpoint is not endpoint or self.upstream is not None:
            return False
        self._send(connection)
        return True

    def on_connect_failed(self, endpoint: EndpointRef, reason: str) -> None:
        """The engine can't be reached."""
        if self.endpoint is endpoint and self.upstream is None:
            self._attempt_failed(reason)

    def _send(self, connection: UpstreamConnection) -> None:
        self.upstream = connection
        connection.exchange = self
        self.sent_at = now = self.worker.loop.time()
        self.deadline = min(now + self.worker.settings.first_byte_timeout, self.expires)
        request = self.request
        body = request.body
        endpoint = connection.endpoint
        framing = (
            b"content-length: %d\r\n" % len(body)
            if not request.upgrades
            else b"connection: upgrade\r\nupgrade: websocket\r\n"
        )
        head = [
            request.method,
            b" ",
            endpoint.path,
            request.target,
            endpoint.request_tail,
            *request.lines,
            self.worker.forwarded_headers(self),
            framing,
            b"x-request-id: ",
            self.request_id,
            b"\r\n\r\n",
        ]
        if len(body) <= _JOIN_LIMIT:
            head.append(body)
            connection.transport.write(b"".join(head))
        else:
            connection.transport.writelines([b"".join(head), body])

    # --- From engine to client ---

    def on_response(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        """The engine's answer begins."""
        status = head.status
        if status in _RETRIED_STATUSES and self._try_elsewhere(connection, status):
            return
        worker = self.worker
        now = worker.loop.time()
        endpoint = connection.endpoint
        variant = endpoint.variant
        self._status = status
        self.began = True
        worker.dispatcher.begun(self, endpoint)
        self.deadline = self.expires
        self._chunk_time = now
        self.first_byte = waited = now - self.started
        variant.stats.first_byte.observe(waited)
        request = self.request
        framing = self._choose_relay(connection, head)
        fallback = f"{HEADER_FALLBACK}: {self.fallback_from}\r\n".encode() if self.fallback_from else b""
        start = b"".join(
            (
                head.lines,
                framing,
                endpoint.headers(self.target.name),
                fallback,
                worker.cors_headers(request) if worker.cors else b"",
                b"x-request-id: ",
                self.request_id,
                b"\r\n\r\n",
            )
        )
        if status == 101:
            self._open_tunnel(connection, start + rest)
        elif self._relay is None:
            self.write_last(start, reusable=not rest)
        elif len(rest) == head.length:
            self.write_last(start + rest, reusable=True)
        else:
            self.client.transport.write(start)
            connection.body = self._relay.feed
            if rest:
                self._relay.feed(rest)
        if self.client.full and self.upstream is not None:
            self.upstream.pause()

    def _choose_relay(self, connection: UpstreamConnection, head: ResponseHead) -> bytes:
        """Decides how the body passes, and returns the header lines that say so."""
        if head.status == 101:
            return b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        if head.status in (204, 304):
            return b"\r\n"
        http10 = self.request.http10
        connection_line = b"\r\n" if self._client_stays() else b"\r\nconnection: close\r\n"
        if http10 and self._client_stays():
            connection_line = b"\r\nconnection: keep-alive\r\n"
        self.events = head.events
        connection.stays = head.keep_alive
        if head.length >= 0:
            self._relay = SizedRelay(self, head.length) if head.length else None
            return connection_line + b"content-length: %d\r\n" % head.length
        if head.events:
            self._relay = EventRelay(self, chunked_in=head.chunked, chunked_out=not http10)
        elif head.chunked and not http10:
            self._relay = ChunkedRelay(self)
        else:
            self._relay = PlainRelay(self, chunked_in=head.chunked, chunked_out=not http10)
        if http10:
            self.request.keep_alive = False
            return b"\r\nconnection: close\r\n"
        return connection_line + b"transfer-encoding: chunked\r\n"

    def _client_stays(self) -> bool:
        return self.request.keep_alive and not self.worker.draining

    def write(self, data: bytes) -> None:
        """Passes a piece of the body on."""
        self._chunk_time = self.worker.loop.time()
        self.client.transport.write(data)

    def write_events(self, data: bytes) -> None:
        """Passes whole events on."""
        now = self.worker.loop.time()
        self.endpoint.variant.stats.gap.observe(now - self._chunk_time)  # type: ignore[union-attr]
        self._chunk_time = now
        if USAGE_KEY in data:
            self._usage = data
        self.client.transport.write(data)

    def write_last(self, data: bytes, *, reusable: bool) -> None:
        """Passes the end of the answer on and accounts for it."""
        if data:
            self.client.transport.write(data)
            if self._status == 200:
                self._read_usage(data)
        connection = self.upstream
        assert connection is not None  # noqa: S101 - it feeds this very call
        self.upstream = None
        if reusable and connection.stays:
            self.worker.connector.keep(connection)
        else:
            connection.exchange = None
            connection.transport.abort()
        self._finish()

    def _read_usage(self, last: bytes) -> None:
        usage = read_usage(last) or (read_usage(self._usage) if self._usage else None)
        if usage is not None:
            self.input_tokens, self.output_tokens = usage
            stats = self.endpoint.variant.stats  # type: ignore[union-attr]
            stats.input_tokens += usage[0]
            stats.output_tokens += usage[1]

    # --- Failures ---

    def _try_elsewhere(self, connection: UpstreamConnection, status: int) -> bool:
        """Gives an engine's 5xx to nobody while another engine may do better."""
        if self.request.upgrades:
            return False
        other = self.worker.dispatcher.alternative(self)
        if other is None:
            return False
        self.worker.log_failure(connection.endpoint, f"answered {status}")
        self._detach(connection)
        self._move(other)
        return True

    def on_upstream_closed(self, connection: UpstreamConnection, reason: str) -> None:
        """The engine's connection is gone."""
        if self._relay is not None and connection.body is not None and self._relay.eof():
            return
        if self.tunnel:
            self.client.transport.close()
            self._end(connection)
            return
        self._lost(connection, reason)

    def on_upstream_lost(self, reason: str) -> None:
        """The engine answers what can't be passed on."""
        if self.upstream is not None:
            self._lost(self.upstream, reason, broken=True)

    def _lost(self, connection: UpstreamConnection, reason: str, *, broken: bool = False) -> None:
        self._detach(connection)
        if self.began:
            self._cut_off(reason)
        elif connection.reused and not self._fresh_retry and not broken:
            # It closed an idle connection just as the request was sent: no fault of the engine.
            self._fresh_retry = True
            assert self.endpoint is not None  # noqa: S101 - it is being tried
            self.worker.connector.open(self.endpoint, self)
        else:
            self._attempt_failed(reason)

    def _detach(self, connection: UpstreamConnection) -> None:
        connection.exchange = None
        self.upstream = None
        connection.transport.abort()

    def _attempt_failed(self, reason: str, status: int = 502) -> None:
        """Tries another engine, or gives up with an error that names the reason."""
        endpoint = self.endpoint
        assert endpoint is not None  # noqa: S101 - it is being tried
        endpoint.variant.stats.failures += 1
        self.worker.log_failure(endpoint, reason)
        other = self.worker.dispatcher.alternative(self)
        if other is not None:
            self._move(other)
            return
        message = f"the engine {endpoint.id!r} of {self.target.name!r} {reason}"
        if self.attempts > 1:
            message += f"; {self.attempts} engines were tried"
        self.fail(RequestError(status, message, code="engine_failed", retry_after=1.0))

    def _move(self, other: EndpointRef) -> None:
        """Tries the next engine."""
        other.variant.stats.retries += 1
        self._fresh_retry = False
        self.release()
        self.worker.dispatcher.assign(self, other)

    def _cut_off(self, reason: str) -> None:
        """Ends an answer whose engine is gone so that nobody takes it for whole."""
        endpoint = self.endpoint
        assert endpoint is not None  # noqa: S101 - it has begun to answer
        endpoint.variant.stats.failures += 1
        self.worker.log_failure(endpoint, reason)
        transport = self.client.transport
        if self.events:
            error = RequestError(502, f"the engine {endpoint.id!r} {reason}", code="engine_failed")
            event = b"data: " + error.body(anthropic=self.operation.anthropic) + b"\n\n"
            if self.operation.anthropic:
                event = b"event: error\n" + event
            transport.write(event if self.request.http10 else frame(event))
        self._status = 502
        transport.close()
        self._finish()

    def fail(self, error: RequestError) -> None:
        """Answers with an error of the router's own."""
        self._status = error.status
        operation = OPERATIONS.get(self.request.path)
        headers = b"content-type: application/json\r\n" + error.extra_headers()
        body = error.body(anthropic=operation is not None and operation.anthropic)
        self.answer(error.status, headers, body)

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Answers here, without an engine."""
        self._status = status
        request = self.request
        if self.worker.cors:
            headers += self.worker.cors_headers(request)
        headers += b"x-request-id: " + self.request_id + b"\r\n"
        keep_alive = self._client_stays()
        if request.http10 and keep_alive:
            headers += b"connection: keep-alive\r\n"
        request.keep_alive = keep_alive
        self.client.respond(status, headers, body, keep_alive=keep_alive, head_only=request.method == b"HEAD")
        self._finish()

    def on_timeout(self, now: float) -> None:
        """The current wait is over."""
        if self.expires <= now:
            error = RequestError(504, "the request's own deadline is over", code="deadline_exceeded")
        elif self.endpoint is None:
            error = self.worker.dispatcher.waited_too_long(self)
        elif self.began:
            self._give_up(f"sent nothing for {self.worker.settings.idle_timeout:g} s")
            return
        else:
            if self.upstream is not None:
                self._detach(self.upstream)
            self._attempt_failed(f"sent no answer within {self.worker.settings.first_byte_timeout:g} s", 504)
            return
        if self.began:
            self._give_up("was stopped: " + error.message)
            return
        if self.upstream is not None:
            self._detach(self.upstream)
        self.fail(error)

    def _give_up(self, reason: str) -> None:
        if self.upstream is not None:
            self._detach(self.upstream)
        self._cut_off(reason)

    def idle_since(self) -> float:
        """Loop time of the last byte of an answer that has begun and isn't held up by its client."""
        return self._chunk_time if self.began and not self.client.full and not self.tunnel else _NEVER

    # --- Flow control and tunnels ---

    def on_client_full(self) -> None:
        """The client reads slowly."""
        if self.upstream is not None:
            self.upstream.pause()

    def on_client_drained(self) -> None:
        """The client has caught up."""
        self._chunk_time = self.worker.loop.time()
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

    def _open_tunnel(self, connection: UpstreamConnection, start: bytes) -> None:
        self.tunnel = True
        self.request.keep_alive = False
        self.client.transport.write(start)
        connection.body = self.client.transport.write

    def on_client_data(self, data: bytes) -> None:
        """Bytes for the engine, in a tunnel."""
        if self.upstream is not None:
            self.upstream.transport.write(data)

    # --- The end ---

    def cancel(self) -> None:
        """The client is gone: so is the engine's work for it."""
        self._status = self._status or 499
        connection = self.upstream
        if connection is not None:
            self._detach(connection)
        elif self.endpoint is None:
            self.worker.dispatcher.forget(self)
        self._account()

    def release(self) -> None:
        """Takes the request off its engine's count."""
        endpoint = self.endpoint
        if endpoint is not None:
            self.endpoint = None
            self.worker.dispatcher.released(self, endpoint)

    def _end(self, connection: UpstreamConnection) -> None:
        connection.exchange = None
        self.upstream = None
        self._account()

    def _finish(self) -> None:
        self._account()
        client = self.client
        if client.exchange is self:
            client.exchange_done(keep_alive=self._client_stays() and not self.request.upgrades)

    def _account(self) -> None:
        worker = self.worker
        worker.active.discard(self)
        worker.count(self, self._status, worker.loop.time())
        self.release()


def _parse_timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86_400:
        raise RequestError(
            400, f"x-modelfleet-timeout: {text[:40]!r} is no number of seconds", code="invalid_header"
        )
    return seconds
