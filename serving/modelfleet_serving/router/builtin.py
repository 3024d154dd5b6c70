"""What the router answers itself: models, health, metrics, preflights, and what doesn't exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, unquote

import msgspec

from modelfleet_serving.router.api import MODELS_PATH, Kind, Operation, find_operation
from modelfleet_serving.router.errors import RequestError

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.request import Request
    from modelfleet_serving.router.table import Target
    from modelfleet_serving.router.tenants import Tenant

_JSON: Final = b"content-type: application/json\r\n"
_TEXT: Final = b"content-type: text/plain; charset=utf-8\r\n"
_READ: Final = (b"GET", b"HEAD")
_encode: Final = msgspec.json.Encoder().encode


def answer(exchange: Exchange) -> None:
    """Answers a path that no engine serves.

    Raises:
        RequestError: 404 or 405.
    """
    request = exchange.request
    path = request.path
    if request.method == b"OPTIONS":
        _preflight(exchange)
    elif path in (b"/healthz", b"/health", b"/readyz", b"/metrics", MODELS_PATH) or path.startswith(
        MODELS_PATH + b"/"
    ):
        if request.method not in _READ:
            raise _method_error(request.method, "GET, HEAD")
        _read(exchange, path)
    else:
        shown = path[:200].decode("latin-1")
        raise RequestError(404, f"there is nothing at {shown!r}", code="unknown_url")


def _read(exchange: Exchange, path: bytes) -> None:
    worker = exchange.worker
    if path in (b"/healthz", b"/health"):  # the latter is what engines have, and their clients look at
        exchange.answer(200, _TEXT, b"ok\n")
    elif path == b"/readyz":
        reason = worker.not_ready()
        exchange.answer(503 if reason else 200, _TEXT, (reason or "ok").encode() + b"\n")
    elif path == b"/metrics":
        worker.answer_metrics(exchange)
    elif path == MODELS_PATH:
        data = [
            entry for target in worker.table.targets() for entry in _entries(target, exchange.request.tenant)
        ]
        exchange.answer(200, _JSON, _encode({"object": "list", "data": data}))
    else:
        name = unquote(path[len(MODELS_PATH) + 1 :].decode("latin-1"))
        target = worker.table.resolve(name)
        if exchange.request.tenant is not None:
            exchange.request.tenant.check(target.name, target.pin)
        exchange.answer(200, _JSON, _encode(_entry(target, target.pin)))


def _entries(target: Target, tenant: Tenant | None) -> list[dict[str, object]]:
    """A model or adapter, and each of its variants by its own name, as far as a tenant may use them."""
    if tenant is not None and not tenant.allows(target.name):
        return []
    allowed = tenant.variants_of(target.name) if tenant is not None else None
    variants = [name for name in target.model.variants if allowed is None or name in allowed]
    return [_entry(target, None), *(_entry(target, variant) for variant in variants)]


def _entry(target: Target, variant: str | None) -> dict[str, object]:
    model = target.model
    entry: dict[str, object] = {
        "id": f"{target.name}:{variant}" if variant else target.name,
        "object": "model",
        "created": 0,
        "owned_by": model.namespace,
        "root": target.name,
        "parent": model.name if target.adapter else None,
    }
    if variant:
        entry["variant"] = variant
    else:
        entry["variants"] = list(model.variants)
    return entry


def check_method(request: Request, operation: Operation) -> None:
    """Allows what an engine's path takes.

    Raises:
        RequestError: 405 or 426.
    """
    if request.method not in operation.methods:
        raise _method_error(request.method, b", ".join(operation.methods).decode())
    if operation.kind is Kind.WEBSOCKET and (request.upgrade != b"websocket" or not request.upgrades):
        raise RequestError(
            426,
            "this endpoint speaks WebSocket",
            code="upgrade_required",
            headers=b"upgrade: websocket\r\n",
        )


def _method_error(method: bytes, allowed: str) -> RequestError:
    return RequestError(
        405,
        f"{method.decode()} is not allowed here, only {allowed}",
        code="method_not_allowed",
        headers=f"allow: {allowed}, OPTIONS\r\n".encode(),
    )


def _preflight(exchange: Exchange) -> None:
    path = exchange.request.path
    operation = find_operation(path)
    allowed = b", ".join(operation.methods) if operation is not None else b"GET, HEAD, POST"
    request = exchange.request
    headers = b"allow: " + allowed + b", OPTIONS\r\n"
    if exchange.worker.cors and b"allow-origin" in exchange.worker.cors_headers(request):
        asked = request.special.get(b"access-control-request-headers", b"*")
        headers += b"access-control-allow-methods: " + allowed + b", OPTIONS\r\n"
        headers += b"access-control-allow-headers: " + asked + b"\r\naccess-control-max-age: 600\r\n"
    exchange.answer(204, headers, b"")


def query_value(query: bytes, name: bytes) -> str | None:
    """Value of a query parameter."""
    values = parse_qs(query, max_num_fields=64).get(name)
    return values[-1].decode("utf-8", "replace") if values else None
