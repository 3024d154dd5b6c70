"""What a request may ask of the router itself: its tenant's leave, a deadline, signs of life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelfleet_serving.contract import HEADER_KEEP_ALIVE, HEADER_PRIORITY, HEADER_TIMEOUT
from modelfleet_serving.router.digits import read_digits
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.routing import prepare_usage, streams
from modelfleet_serving.router.waiting import read_priority

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.peek import Peek
    from modelfleet_serving.router.request import Request
    from modelfleet_serving.router.tenants import Tenant

_TIMEOUT: Final = HEADER_TIMEOUT.encode()
_PRIORITY: Final = HEADER_PRIORITY.encode()
_KEEP_ALIVE: Final = HEADER_KEEP_ALIVE.encode()
_LONGEST: Final = 86_400.0


def read_options(exchange: Exchange) -> None:
    """Reads the headers that are meant for the router.

    Raises:
        RequestError: 400 with the header's name.
    """
    request = exchange.request
    special = request.special
    if _TIMEOUT in special:
        exchange.expires = exchange.started + _seconds(request, HEADER_TIMEOUT)
    if _PRIORITY in special:
        read_priority(exchange)  # refused whether it has to wait or not
    peek = exchange.peek
    if _KEEP_ALIVE in special and peek is not None and streams(peek):
        exchange.keep_alive_seconds = _seconds(request, HEADER_KEEP_ALIVE)
        exchange.next_comment = exchange.started + exchange.keep_alive_seconds
        if not request.http10:
            exchange.worker.dispatcher.waiting.kept_alive.add(exchange)


def admit(exchange: Exchange, tenant: Tenant) -> None:
    """Lets a request in, within what its tenant may use.

    Raises:
        RequestError: 403 or 429.
    """
    exchange.salt = tenant.name
    target = exchange.target
    tenant.check(target.name, target.pin)
    peek = exchange.peek
    output = output_limit(peek) if peek is not None else 0
    exchange.lease = exchange.worker.tenancy.admit(tenant, exchange.readable, output)
    if tenant.metered:
        prepare_usage(exchange)


def output_limit(peek: Peek) -> int:
    """Tokens that a body asks for at most; 0 when it doesn't say."""
    for raw in (peek.max_completion_tokens, peek.max_tokens):
        if raw:
            text = bytes(raw)
            number, end = read_digits(text, 0)
            # More digits than are read are no smaller a wish.
            if end and (end == len(text) or text.isdigit()):
                return number
    return 0


def _seconds(request: Request, name: str) -> float:
    text = request.text(name) or ""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _LONGEST:
        raise RequestError(400, f"{name}: {text[:40]!r} is no number of seconds", code="invalid_header")
    return seconds
