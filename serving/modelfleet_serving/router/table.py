"""The route table as the data path reads it: every lookup is one dictionary access.

Objects survive updates: an endpoint keeps its connections, counts and health while its model is rewritten,
and a model keeps the requests that wait for it.
"""

from __future__ import annotations

import functools
import logging
import random
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from modelfleet_serving.contract import (
    HEADER_MODEL,
    HEADER_REPLICA,
    HEADER_VARIANT,
    Affinity,
    Endpoint,
    EndpointState,
    ModelRoute,
    VariantRoute,
)
from modelfleet_serving.router.affinity import seed_of
from modelfleet_serving.router.choice import Pool, VariantPlan
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.health import OutlierDetector, Outliers, RetryBudget, limit_of
from modelfleet_serving.router.known_heads import KnownAnswers
from modelfleet_serving.router.meters import VariantMeter

if TYPE_CHECKING:
    from modelfleet_serving.router.upstream import UpstreamConnection

_log = logging.getLogger(__name__)

_NAMES_IN_ERROR: Final = 50
_UNFIT: Final = re.compile(r"[^\x21-\x7e]")
_MAX_HOST: Final = 253
_MAX_LABEL: Final = 63
"""Characters of a name and of its parts between dots (RFC 1035)."""


class TableError(ValueError):
    """A route table that can't be used; says where."""


class EndpointRef:
    """One engine.

    Attributes:
        row: its row of shared counters.
        cell: this worker's cell in that row.
        ready: may get new requests, by its supervisor's word.
        limit: requests it may have in flight now; 0 while it is not to get any.
        idle: open connections that carry no request, the most recently used last.
        answers: the head that it answered with last.
    """

    __slots__ = (
        "_blocks",
        "adapters",
        "answers",
        "authority",
        "capacity",
        "cell",
        "circuit",
        "host",
        "id",
        "idle",
        "limit",
        "path",
        "port",
        "ready",
        "request_tail",
        "revision",
        "row",
        "state",
        "tls",
        "variant",
    )

    def __init__(self, spec: Endpoint, variant: VariantRef, row: int, cell: int) -> None:
        self.id = spec.id
        self.variant = variant
        self.row = row
        self.cell = cell
        self.ready = False
        self.circuit = variant.health.circuit(spec.id)
        self.idle: list[UpstreamConnection] = []
        self.answers = KnownAnswers()
        self._blocks: dict[str, bytes] = {}
        self.tls, self.host, self.port, self.authority, self.path = parse_endpoint_url(spec.url)
        self.request_tail = b" HTTP/1.1\r\nhost: " + self.authority + b"\r\n"
        self.update(spec)

    def update(self, spec: Endpoint) -> None:
        """Takes over what may change in an endpoint's life."""
        was_ready = self.ready
        self.state = spec.state
        self.ready = spec.state is EndpointState.READY
        self.capacity = spec.capacity
        if self.ready and not was_ready:
            # Started anew, says its supervisor: what it did before doesn't count.
            self.variant.health.forget(self.id)
            self.circuit = self.variant.health.circuit(self.id)
        self.limit = limit_of(self, self.circuit)
        self.revision = spec.revision
        self.adapters = frozenset(spec.adapters)

    def headers(self, model: str) -> bytes:
        """Header lines that tell a client who answered."""
        block = self._blocks.get(model)
        if block is None:
            block = (
                f"{HEADER_MODEL}: {model}\r\n{HEADER_VARIANT}: {self.variant.name}\r\n"
                f"{HEADER_REPLICA}: {self.id}\r\n"
            ).encode("ascii")
            self._blocks[model] = block
        return block


class VariantRef:
    """One variant of a model with its engines."""

    __slots__ = ("endpoints", "health", "model", "name", "pool", "stats")

    def __init__(self, name: str, model: ModelRef) -> None:
        self.name = name
        self.model = model
        self.endpoints: list[EndpointRef] = []
        self.pool: Pool[EndpointRef] = Pool(())
        self.health: OutlierDetector = OutlierDetector(Outliers(), random.Random())  # noqa: S311 - spreads probes
        self.stats = VariantMeter(model.name, name)


class ModelRef:
    """One model."""

    __slots__ = (
        "adapters",
        "affinity",
        "budget",
        "name",
        "namespace",
        "plan",
        "queue",
        "row",
        "stats",
        "suspended",
        "variants",
    )

    def __init__(self, spec: ModelRoute, row: int) -> None:
        self.name = spec.name
        self.row = row
        self.stats = VariantMeter(spec.name, "")
        self.budget = RetryBudget()
        self.take(spec, {})

    def take(self, spec: ModelRoute, variants: dict[str, VariantRef]) -> None:
        """Takes over settings and variants."""
        self.namespace = spec.namespace
        self.affinity: Affinity = spec.affinity
        self.queue = spec.queue
        self.suspended = spec.suspended
        self.variants = variants
        self.plan = VariantPlan(variants, spec.weights, spec.fallback, random.random())  # noqa: S311
        self.adapters = frozenset(spec.adapters).union(
            name for variant in spec.variants for endpoint in variant.endpoints for name in endpoint.adapters
        )

    def clear(self) -> None:
        """It is gone: what waits for it sees no variants.

        Nor does it know them any more, as they know it: the collector hardly ever looks at a route table.
        """
        self.variants = {}
        self.plan = VariantPlan(self.variants, {}, (), 0.0)


class Target:
    """What a request's model name stands for.

    Attributes:
        name: the name without a variant: what the engine is asked for and the answer's header says.
        pin: the variant that was named, or ``None``.
        adapter: the LoRA adapter, when the name is an adapter's.
    """

    __slots__ = ("_pinned", "_seeds", "adapter", "model", "name", "pin")

    def __init__(self, name: str, model: ModelRef, adapter: str | None, pin: str | None = None) -> None:
        self.name = name
        self.model = model
        self.adapter = adapter
        self.pin = pin
        self._pinned: dict[str, Target] = {}
        self._seeds: dict[str, int] = {}

    def seed(self, salt: str) -> int:
        """Where prompt fingerprints start: prefixes are shared within one model, adapter and tenant."""
        seed = self._seeds.get(salt)
        if seed is None:
            if len(self._seeds) > 10_000:
                self._seeds.clear()
            seed = self._seeds[salt] = seed_of(self.model.name, self.adapter or "", salt)
        return seed

    def pinned(self, variant: str) -> Target:
        """The same target bound to a variant.

        Raises:
            RequestError: 404 when the model has no such variant.
        """
        target = self._pinned.get(variant)
        if target is None or variant not in self.model.variants:
            if variant not in self.model.variants:
                names = ", ".join(sorted(self.model.variants)) or "none"
                raise RequestError(
                    404,
                    f"the model {self.name!r} has no variant {variant!r}; its variants are: {names}",
                    code="variant_not_found",
                    param="model",
                )
            target = self._pinned[variant] = Target(self.name, self.model, self.adapter, variant)
        return target


class Table:
    """All routes of one worker."""

    def __init__(self, row_of: Callable[[str], int], cell_of: Callable[[int], int]) -> None:
        """``row_of`` gives the shared counter row of a key, ``cell_of`` this worker's cell of a row."""
        self._row_of = row_of
        self._cell_of = cell_of
        self.models: dict[str, ModelRef] = {}
        self._names: dict[str, Target] = {}
        self._suspended: set[str] = set()
        self.loaded = False

    def put(self, spec: ModelRoute) -> list[EndpointRef]:
        """Takes over one model; returns the endpoints that are gone from it."""
        model = self.models.get(spec.name)
        if model is None:
            model = self.models[spec.name] = ModelRef(spec, self._row_of(queue_key(spec.name)))
        gone: list[EndpointRef] = []
        old = dict(model.variants)
        variants: dict[str, VariantRef] = {}
        for variant_spec in spec.variants:
            variant = old.pop(variant_spec.name, None) or VariantRef(variant_spec.name, model)
            gone += self._fill(variant, variant_spec)
            variants[variant.name] = variant
        model.take(spec, variants)
        for variant in old.values():
            gone += _empty(variant)
        return gone

    def _fill(self, variant: VariantRef, spec: VariantRoute) -> list[EndpointRef]:
        known = {(ref.id, ref.authority, ref.path): ref for ref in variant.endpoints}
        endpoints = []
        for endpoint in spec.endpoints:
            if not endpoint.url:
                continue
            _, _, _, authority, path = parse_endpoint_url(endpoint.url)
            ref = known.pop((endpoint.id, authority, path), None)
            if ref is None:
                row = self._row_of(endpoint_key(spec.name, variant.model.name, endpoint))
                ref = EndpointRef(endpoint, variant, row, self._cell_of(row))
            else:
                ref.update(endpoint)
            endpoints.append(ref)
        variant.endpoints = endpoints
        variant.health.ready = sum(ref.ready for ref in endpoints)
        ids = {ref.id for ref in endpoints}
        for ref in known.values():
            if ref.id not in ids:
                variant.health.forget(ref.id)
        variant.pool = Pool(endpoints, spec.revision_weights, random.random())  # noqa: S311 - a share, no secret
        for ref in known.values():
            ref.ready = False
        return list(known.values())

    def remove(self, name: str) -> list[EndpointRef]:
        """Drops a model; returns its endpoints."""
        model = self.models.pop(name, None)
        if model is None:
            return []
        gone = [ref for variant in model.variants.values() for ref in _empty(variant)]
        model.clear()
        return gone

    def publish(self) -> None:
        """Makes the names of added and removed models and adapters known, in one step."""
        served = [model for model in self.models.values() if not model.suspended]
        names = {model.name: Target(model.name, model, None) for model in served}
        for model in served:
            for adapter in model.adapters:
                names.setdefault(adapter, Target(adapter, model, adapter))
        paused = (model for model in self.models.values() if model.suspended)
        self._suspended = {name for model in paused for name in (model.name, *model.adapters)} - names.keys()
        self._names = names
        self.loaded = True

    def resolve(self, name: str) -> Target:
        """The target of ``MODEL``, ``MODEL:VARIANT`` or an adapter's name.

        Raises:
            RequestError: 404 with the names that exist; 503 before the first table, and for a model that is
                suspended.
        """
        target = self._names.get(name)
        if target is not None:
            return target
        base, colon, variant = name.rpartition(":")
        target = self._names.get(base) if colon else None
        if target is None:
            if not self.loaded:
                message = "this router has no route table yet"
                raise RequestError(503, message, code="no_route_table", retry_after=1.0)
            if name in self._suspended or (colon and base in self._suspended):
                raise suspended_error(name)
            raise RequestError(
                404,
                f"the model {_printable(name)!r} does not exist; {self._existing()}",
                code="model_not_found",
                param="model",
            )
        return target.pinned(variant)

    def targets(self) -> Iterable[Target]:
        """Every model and adapter."""
        return self._names.values()

    def _existing(self) -> str:
        names = sorted(self._names)
        if not names:
            return "no model is being served"
        shown = ", ".join(names[:_NAMES_IN_ERROR])
        more = len(names) - _NAMES_IN_ERROR
        return f"models are: {shown}" + (f" and {more} more (GET /v1/models lists them)" if more > 0 else "")


def suspended_error(name: str) -> RequestError:
    """The answer to a request for a suspended model; it tells clients that trying again won't help."""
    message = f"the model {_printable(name)!r} is suspended: nothing runs until its spec.suspend is false"
    return RequestError(503, message, code="model_suspended", headers=b"x-should-retry: false\r\n")


def _empty(variant: VariantRef) -> list[EndpointRef]:
    gone = variant.endpoints
    variant.endpoints = []
    variant.pool = Pool(())
    for ref in gone:
        ref.ready = False
        variant.health.forget(ref.id)
    return gone


def _printable(name: str) -> str:
    return name if len(name) <= 200 else name[:200] + "…"


def endpoint_key(variant: str, model: str, endpoint: Endpoint) -> str:
    """Key of an endpoint's shared counter."""
    return f"endpoint {model} {variant} {endpoint.id} {endpoint.url}"


@functools.lru_cache(maxsize=32_768)
def parse_endpoint_url(url: str) -> tuple[bool, str, int, bytes, bytes]:
    """TLS or not, host, port, authority and path prefix of an engine's base URL."""
    if _UNFIT.search(url):
        raise TableError(f"{url[:200]!r}: only ASCII without spaces (names in Punycode)")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise TableError(f"{url[:200]!r}: {error}") from error
    if "@" in parts.netloc:
        raise TableError("a base URL must not hold credentials")  # nor may this message
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or port == 0:
        raise TableError(f"{url[:200]!r} is not a base URL such as http://10.0.0.7:8000")
    if len(host) > _MAX_HOST or any(
        not 0 < len(label) <= _MAX_LABEL for label in host.rstrip(".").split(".")
    ):
        raise TableError(f"{url[:200]!r}: no host has such a name")
    tls = parts.scheme == "https"
    return tls, host, port or (443 if tls else 80), parts.netloc.encode(), parts.path.rstrip("/").encode()


def queue_key(model: str) -> str:
    """Key of a model's shared count of waiting requests."""
    return f"queue {model}"


def model_keys(model: ModelRoute) -> list[str]:
    """Keys of all shared counters of a model."""
    keys = [
        endpoint_key(variant.name, model.name, endpoint)
        for variant in model.variants
        for endpoint in variant.endpoints
    ]
    return [queue_key(model.name), *keys]
