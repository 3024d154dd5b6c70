"""What becomes of a request whose engine fails it: another engine, a stream that goes on, or an error.

Before the first byte another engine is tried; after it another one may go on with a stream of text; else the
answer ends so that nobody takes it for whole. Every failure is reported to the dispatcher, which ejects the
engines that fail too often. Nothing here runs for a request that goes well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.api import Kind
from modelfleet_serving.router.continuation import NotContinuableError, continue_stream
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.health import Failure

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.table import EndpointRef
    from modelfleet_serving.router.upstream import UpstreamConnection

_MAY_PASS: Final = frozenset({408, 425, 429})
"""Refusals that another engine, or the same one later, may not repeat."""


def try_elsewhere(exchange: Exchange, connection: UpstreamConnection, status: int) -> bool:
    """Gives an engine's 5xx to nobody while another engine may do better.

    Returns:
        Whether another engine is tried; if not, the answer is to be passed on.
    """
    if exchange.request.upgrades:
        return False
    other = exchange.worker.dispatcher.alternative(exchange)
    if other is None:
        return False
    exchange.worker.log_failure(connection.endpoint, f"answered {status}")
    exchange.detach(connection)
    _move(exchange, other)
    return True


def lost(exchange: Exchange, connection: UpstreamConnection, reason: str, *, broken: bool = False) -> None:
    """The engine's connection ended too early; ``broken`` where it was ended for a malformed answer."""
    if exchange.began:
        exchange.worker.dispatcher.failed(connection.endpoint, Failure.BROKEN)
        exchange.detach(connection)
        go_on(exchange, reason)
        return
    exchange.detach(connection)
    if connection.reused and not exchange.fresh_retry and not broken:
        # It closed an idle connection just as the request was sent: no fault of the engine.
        exchange.fresh_retry = True
        exchange.worker.connector.open(connection.endpoint, exchange)
    else:
        attempt_failed(exchange, reason, Failure.BROKEN)


def attempt_failed(exchange: Exchange, reason: str, failure: Failure, status: int = 502) -> None:
    """Tries another engine, or gives up with an error that names the reason."""
    endpoint = exchange.endpoint
    assert endpoint is not None  # noqa: S101 - it is being tried
    endpoint.variant.stats.failures += 1
    exchange.worker.log_failure(endpoint, reason)
    dispatcher = exchange.worker.dispatcher
    dispatcher.failed(endpoint, failure)
    if exchange.began:
        go_on(exchange, reason)
        return
    other = dispatcher.alternative(exchange, unsent=failure is Failure.CONNECT)
    if other is not None:
        _move(exchange, other)
    else:
        exchange.fail(_engine_error(exchange, status, reason))


def did_not_go_on(exchange: Exchange, connection: UpstreamConnection, status: int) -> None:
    """The engine that was to go on with a stream answers something else."""
    exchange.detach(connection)
    if 400 <= status < 500 and status not in _MAY_PASS:
        # It understands the request and won't have it: no engine would, and it is not sick for that.
        cut_off(exchange, None, _engine_error(exchange, 502, f"answered {status}"))
        return
    exchange.worker.dispatcher.failed(connection.endpoint, Failure.STATUS)
    go_on(exchange, f"answered {status}")


def go_on(exchange: Exchange, reason: str) -> None:
    """Lets another engine of the variant go on with a stream, or ends it with an error."""
    endpoint, reply = exchange.endpoint, exchange.reply
    assert endpoint is not None  # noqa: S101 - it has begun to answer
    assert reply is not None  # noqa: S101
    recorder = reply.recorder
    failed = _engine_error(exchange, 502, reason)
    if recorder is None:
        cut_off(exchange, None, failed)
        return
    delivered = recorder.read()
    exchange.order = (endpoint.variant,)
    progress = delivered is not None and delivered.size > (reply.splice.begun_at if reply.splice else 0)
    if progress:
        exchange.attempts = 1
    other = exchange.worker.dispatcher.alternative(exchange)
    if other is None and progress:
        # Text has come since the last engine died: those that died before may be back.
        exchange.tried.clear()
        other = exchange.worker.dispatcher.alternative(exchange)
    try:
        going_on = continue_stream(
            exchange.operation.kind is Kind.CHAT,
            exchange.request.body,
            delivered,
            source=endpoint.id,
            target=other.id if other is not None else "",
        )
    except NotContinuableError as error:
        failed.message += f"; {error}"
        cut_off(exchange, None, failed)
        return
    exchange.worker.log_failure(endpoint, reason)
    if going_on.body is None:
        reply.close_stream(going_on.closing)
    elif other is None:
        cut_off(exchange, None, failed)
    else:
        endpoint.variant.stats.failures += 1
        reply.splice = going_on.splice
        exchange.body = going_on.body
        _move(exchange, other)


def cut_off(exchange: Exchange, connection: UpstreamConnection | None, error: RequestError) -> None:
    """Ends an answer that has begun and can't be finished."""
    reply = exchange.reply
    assert reply is not None  # noqa: S101 - it has begun
    if connection is not None:
        exchange.detach(connection)
    endpoint = exchange.endpoint
    if endpoint is not None:
        endpoint.variant.stats.failures += 1
        exchange.worker.log_failure(endpoint, error.message)
    goes_on = reply.end_with_error(error)
    reply.status = error.status
    if not goes_on:
        exchange.request.keep_alive = False
        exchange.client.transport.close()
    exchange.finish()


def time_out(exchange: Exchange, now: float) -> None:
    """The request's current wait is over: its own deadline, or that for a first or a next byte."""
    if exchange.expires <= now:
        _expire(exchange)
        return
    settings = exchange.worker.settings
    if exchange.began:
        if exchange.upstream is not None:
            exchange.detach(exchange.upstream)
        go_on(exchange, f"sent nothing for {settings.idle_timeout:g} s")
    elif exchange.endpoint is not None:
        if exchange.upstream is not None:
            exchange.detach(exchange.upstream)
        limit = settings.first_byte_timeout
        attempt_failed(exchange, f"sent no answer within {limit:g} s", Failure.TIMEOUT, 504)


def _expire(exchange: Exchange) -> None:
    error = RequestError(504, "the request's own deadline is over", code="deadline_exceeded")
    if exchange.ticket is not None:
        exchange.worker.dispatcher.waiting.forget(exchange)
    if exchange.began:
        cut_off(exchange, exchange.upstream, error)
        return
    if exchange.upstream is not None:
        exchange.detach(exchange.upstream)
    exchange.fail(error)


def _move(exchange: Exchange, other: EndpointRef) -> None:
    """Tries the next engine."""
    other.variant.stats.retries += 1
    exchange.fresh_retry = False
    exchange.release()
    exchange.worker.dispatcher.assign(exchange, other)


def _engine_error(exchange: Exchange, status: int, reason: str) -> RequestError:
    endpoint = exchange.endpoint
    name = endpoint.id if endpoint is not None else "?"
    message = f"the engine {name!r} of {exchange.target.name!r} {reason}"
    if exchange.attempts > 1:
        message += f"; {exchange.attempts} engines were tried"
    return RequestError(status, message, code="engine_failed", retry_after=1.0)
