"""What a request asks for: its model and variant, and what the engine is told instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.api import Kind
from modelfleet_serving.router.body import multipart_model
from modelfleet_serving.router.builtin import query_value
from modelfleet_serving.router.continuation import ask_usage
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.peek import Peek, peek, rename
from modelfleet_serving.router.table import Target

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange

_NO: Final = frozenset({b"", b"false", b"null", b"0", b'"false"'})
_IDENTITY: Final = b"identity"
# Looked up once: before Python 3.12 a member of an enumeration is found by way of an exception.
_MULTIPART: Final = Kind.MULTIPART
_WEBSOCKET: Final = Kind.WEBSOCKET
_STREAMED: Final = (Kind.CHAT, Kind.COMPLETION)


def find_target(exchange: Exchange) -> Target:
    """The target of a request. Its body names the bare model afterwards.

    Raises:
        RequestError: 400 or 404.
    """
    request = exchange.request
    coding = request.special.get(b"content-encoding", _IDENTITY).strip().lower()
    if coding != _IDENTITY:
        message = f"content-encoding {coding[:40].decode('latin-1')!r}: send the body uncompressed"
        raise RequestError(415, message, code="unsupported_content_encoding")
    kind = exchange.operation.kind
    span: tuple[int, int] | None = None
    if kind is _MULTIPART:
        span = multipart_model(request.body, request.special.get(b"content-type", b""))
        name: str | None = request.body[span[0] : span[1]].decode("utf-8", "replace")
    elif kind is _WEBSOCKET:
        name = query_value(request.query, b"model") or request.text("x-modelfleet-model")
    else:
        seen = exchange.peek = peek(request.data, request.start)
        name = seen.model
        if exchange.operation.stores and seen.previous_response_id:
            _find_previous(exchange, bytes(seen.previous_response_id))
    if not name:
        raise RequestError(400, "you must provide a model parameter", code="missing_model", param="model")
    target = exchange.worker.table.resolve(name)
    pin = request.special.get(b"x-modelfleet-variant") if request.steered else None
    if pin is not None:
        target = _pin(target, pin.strip().decode("latin-1"))
    if target.name != name:
        if kind is _WEBSOCKET:
            request.target = request.path + b"?" + _rename_in_query(request.query, target.name)
        elif span is not None:
            before, after = request.body[: span[0]], request.body[span[1] :]
            request.body = b"".join((before, target.name.encode(), after))
        elif exchange.peek is not None:
            request.body = rename(exchange.peek, request.data, request.start, target.name)
    return target


def _find_previous(exchange: Exchange, raw: bytes) -> None:
    """Remembers who keeps the response that a request goes on from; without one, the engine will say so."""
    worker = exchange.worker
    salt = exchange.tenant.name if exchange.tenant is not None else ""
    exchange.holder = worker.stored.find(raw.strip(b'"'), salt, worker.table)


def _pin(target: Target, variant: str) -> Target:
    if target.pin is not None and target.pin != variant:
        message = f"the model names the variant {target.pin!r}, the header {variant!r}"
        raise RequestError(400, message, code="variant_conflict", param="model")
    return target.pinned(variant)


def _rename_in_query(query: bytes, name: str) -> bytes:
    return b"&".join(
        b"model=" + name.encode() if part.partition(b"=")[0] == b"model" else part
        for part in query.split(b"&")
    )


def streams(seen: Peek) -> bool:
    """Whether a body asks for a stream, by the same lenient reading that engines apply."""
    return bytes(seen.stream) not in _NO


def prepare_usage(exchange: Exchange) -> None:
    """Makes a stream tell what it used, where its client did not ask for that."""
    seen = exchange.peek
    if seen is None or not streams(seen) or exchange.operation.kind not in _STREAMED:
        return
    request = exchange.request
    request.body, exchange.strip_usage = ask_usage(request.body, bytes(seen.stream_options))
