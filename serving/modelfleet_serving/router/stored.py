"""Responses that an engine keeps: which of them has which, so that later calls find it.

An engine keeps what ``POST /v1/responses`` made in its own memory. ``GET /v1/responses/ID``, its
cancellation, and a next request with ``previous_response_id`` only make sense there. The router reads the id
of each response as it passes, and remembers it in the memory that its workers share with the prefix table:
like prefixes, ids that were not used for a long time are forgotten. Tenants find only their own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from modelfleet_serving.router.api import STORED_PREFIX
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.policy.fingerprint import seed_of
from modelfleet_serving.router.policy.prefix_table import PrefixTable
from modelfleet_serving.router.relay import Relay
from modelfleet_serving.router.table import EndpointRef, Table

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.upstream import UpstreamConnection

_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[!#-\[\]-~]{1,200})"')
_WHERE: Final = 4096
"""Bytes of an answer in which its id must stand; it is the first member, or in the first event."""


class StoredResponses:
    """Where responses are kept, as far as this router has seen them made."""

    def __init__(self, entries: PrefixTable) -> None:
        self._entries = entries

    def add(self, response: bytes, salt: str, endpoint: EndpointRef) -> None:
        """An engine has made a response."""
        if endpoint.row:
            self._entries.add(_key(response, salt), endpoint.row)

    def find(self, response: bytes, salt: str, table: Table) -> EndpointRef | None:
        """The engine that has a response, if it is still there.

        It looks at every endpoint, as such calls are rare.
        """
        rows = self._entries.holders(_key(response, salt))
        if not rows:
            return None
        found = {
            endpoint.row: endpoint
            for model in table.models.values()
            for variant in model.variants.values()
            for endpoint in variant.endpoints
            if endpoint.row in rows
        }
        return next((found[row] for row in rows if row in found), None)


def _key(response: bytes, salt: str) -> int:
    return xxh3_64_intdigest(response, seed_of("stored response", salt))


def stored_id(path: bytes) -> bytes:
    """The response's id in a path below ``/v1/responses/``."""
    return path[len(STORED_PREFIX) :].partition(b"/")[0]


def find_stored(exchange: Exchange) -> EndpointRef:
    """The engine that has the response which a path names.

    Raises:
        RequestError: 404 when it isn't known, or its engine is gone.
    """
    worker = exchange.worker
    response = stored_id(exchange.request.path)
    salt = exchange.tenant.name if exchange.tenant is not None else ""
    endpoint = worker.stored.find(response, salt, worker.table)
    if endpoint is None:
        shown = response[:100].decode("latin-1")
        raise RequestError(
            404,
            f"response {shown!r} is not known: it was not made through this router, is long unused, or its "
            "engine is gone",
            code="response_not_found",
            param="response_id",
        )
    return endpoint


def remember(exchange: Exchange, connection: UpstreamConnection, begun: bytes) -> None:
    """Reads the id of the response that an engine is making, from what came of it and what still comes."""
    relay = connection.relay
    reader = _IdReader(exchange, connection.endpoint, relay)
    if not reader.look(begun) and relay is not None and not exchange.finished:
        connection.relay = reader


class _IdReader(Relay):
    """Passes an answer's bytes on, and looks for the id among the first of them."""

    __slots__ = ("_begun", "_endpoint", "_exchange", "_relay")

    def __init__(self, exchange: Exchange, endpoint: EndpointRef, relay: Relay | None) -> None:
        self._exchange = exchange
        self._endpoint = endpoint
        self._relay = relay
        self._begun = b""

    def look(self, data: bytes) -> bool:
        """Whether there is nothing more to look for."""
        self._begun += data[:_WHERE]
        found = _ID.search(self._begun)
        if found is not None:
            self._exchange.worker.stored.add(found[1], self._exchange.salt, self._endpoint)
        return found is not None or len(self._begun) >= _WHERE

    def feed(self, data: bytes) -> None:
        """Takes a piece of the body."""
        relay = self._relay
        assert relay is not None  # noqa: S101 - it was there when this was put before it
        connection = self._exchange.upstream
        if self.look(data) and connection is not None:
            connection.relay = relay
        relay.feed(data)
