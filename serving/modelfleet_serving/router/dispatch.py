"""Chooses the engine of each request, counts it there, and learns from how it fared."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from modelfleet_serving.contract import Affinity
from modelfleet_serving.router.affinity import (
    Fingerprint,
    PrefixAffinity,
    PrefixTable,
    SharedLoadView,
    fingerprint,
    unread_kib,
)
from modelfleet_serving.router.choice import Selector, session_key
from modelfleet_serving.router.health import Circuit, Failure, State, limit_of
from modelfleet_serving.router.table import EndpointRef, VariantRef
from modelfleet_serving.router.waiting import WaitingRoom

_NONE: Final = Affinity.NONE  # looked up once, as in routing
_PREFIX: Final = Affinity.PREFIX

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.worker import Worker


class Dispatcher:
    """Routing decisions of one worker."""

    def __init__(self, worker: Worker) -> None:
        counters = worker.counters
        rng = random.Random()  # noqa: S311 - spreads load
        load = SharedLoadView(counters.cells, counters.reading, counters.workers)
        self._prefixes = PrefixAffinity(load, rng, PrefixTable(counters.prefixes))
        self._loop = worker.loop
        self._now = worker.now
        self._max_attempts = worker.settings.max_attempts
        self._cells = counters.cells
        self._reading = counters.reading
        self._selector = Selector(load, rng, self._prefixes)
        self._sick: set[VariantRef] = set()
        self.waiting = WaitingRoom(worker, self)

    # --- Choice ---

    def dispatch(self, exchange: Exchange) -> None:
        """Sends a request to an engine, or lets it wait.

        Raises:
            RequestError: 429 or 503 when it can't wait.
        """
        target = exchange.target
        model = target.model
        if exchange.request.steered and model.affinity is not _NONE:
            session = exchange.request.special.get(b"x-modelfleet-session")
            if session is not None:
                exchange.session = session_key(session, target.seed(exchange.salt))
        self.draw(exchange)
        model.budget.request(self._now())
        endpoint = self.pick(exchange)
        if endpoint is None:
            self.waiting.enter(exchange)
        else:
            endpoint.variant.stats.requests += 1
            self.assign(exchange, endpoint)

    def draw(self, exchange: Exchange) -> None:
        """Puts the variants that may serve a request in order, the chosen one first."""
        target = exchange.target
        order = target.model.plan.order(target.pin, exchange.session)
        tenant = exchange.tenant
        if tenant is not None and target.pin is None:
            allowed = tenant.variants_of(target.name)
            if allowed is not None:
                variants = target.model.variants
                order = tuple(variant for variant in order if variant.name in allowed) or tuple(
                    variants[name] for name in sorted(allowed) if name in variants
                )
        exchange.order = order

    def pick(self, exchange: Exchange) -> EndpointRef | None:
        """The engine for a request, ``None`` when none has room."""
        order = exchange.order
        holder = exchange.holder
        if holder is not None and holder.ready and holder.variant in order and holder not in exchange.tried:
            return holder  # the conversation so far is in its memory alone
        adapter = exchange.target.adapter
        for variant in order:
            pool = variant.pool
            groups = pool.groups
            prompt = None
            if exchange.session is None and groups and (len(groups) > 1 or len(groups[0].members) > 1):
                prompt = self._prompt(exchange)
            endpoint = self._selector.pick(
                pool, prompt=prompt, session=exchange.session, adapter=adapter, exclude=exchange.tried
            )
            if endpoint is not None:
                if variant is not order[0]:
                    exchange.fallback_from = order[0].name
                return endpoint
        return None

    def _prompt(self, exchange: Exchange) -> Fingerprint | None:
        """What the prompt begins with, read once a request and only where there is something to choose."""
        if exchange.prompt_read:
            return exchange.prompt
        exchange.prompt_read = True
        peek = exchange.peek
        target = exchange.target
        if peek is not None and exchange.operation.generates and target.model.affinity is _PREFIX:
            raw = peek.messages or peek.prompt or peek.input
            tools, system = peek.tools, peek.system
            before = (tools, system) if tools or system else ()
            exchange.prompt = fingerprint(raw, target.seed(exchange.salt), before)
        return exchange.prompt

    def alternative(self, exchange: Exchange, *, unsent: bool = False) -> EndpointRef | None:
        """Another engine for a request that has got no byte yet, if there is one that may be tried.

        ``unsent``: no engine has seen it, so that another attempt adds no load and needs no budget.
        """
        if exchange.attempts >= self._max_attempts:
            return None
        if exchange.endpoint is not None:
            exchange.tried.append(exchange.endpoint)
        other = self.pick(exchange)
        if other is None or unsent or exchange.target.model.budget.take(self._now()):
            return other
        return None

    # --- Counts ---

    def assign(self, exchange: Exchange, endpoint: EndpointRef) -> None:
        """Counts a request on its engine before it is sent there: the next choice sees it."""
        self._cells[endpoint.cell] += 1
        prompt = exchange.prompt
        readable = exchange.readable
        kib = unread_kib(readable) if prompt is None else unread_kib(readable, prompt.size, prompt.held)
        if kib:
            exchange.reading = kib
            self._reading[endpoint.cell] += kib
        exchange.run_on(endpoint)

    def begun(self, exchange: Exchange, endpoint: EndpointRef) -> None:
        """The engine has read the prompt."""
        if exchange.reading:
            self._reading[endpoint.cell] -= exchange.reading
            exchange.reading = 0

    def released(self, exchange: Exchange, endpoint: EndpointRef) -> None:
        """A request has left an engine: another one may take its place."""
        self.begun(exchange, endpoint)
        self._cells[endpoint.cell] -= 1
        if self.waiting.number:
            self._loop.call_soon(self.waiting.serve, endpoint.variant.model)

    # --- Health ---

    def succeeded(self, endpoint: EndpointRef, now: float) -> None:
        """The engine began to answer as it should."""
        circuit = endpoint.circuit
        if circuit.failures or circuit.ejections or circuit.state:
            health = endpoint.variant.health
            if health.succeeded(circuit, now):
                self._changed(endpoint)
                if not health.out:
                    self._sick.discard(endpoint.variant)

    def failed(self, endpoint: EndpointRef, failure: Failure) -> None:
        """The engine failed a request or a health check."""
        variant = endpoint.variant
        if variant.health.failed(endpoint.circuit, failure, self._now()):
            variant.stats.ejections += 1
            self._sick.add(variant)
            self._changed(endpoint)

    def shared_by(self, routers: int) -> None:
        """So many routers share the engines, as far as is known."""
        self._prefixes.shared_by(routers)

    def sweep(self, now: float) -> None:
        """Lets ejected engines come back, and waiting requests go or give up."""
        for variant in tuple(self._sick):
            changed = variant.health.sweep(now)
            if changed:
                self._on_probation(variant, changed)
            if not variant.health.out:
                self._sick.discard(variant)
        if self.waiting.number or self.waiting.kept_alive:
            self.waiting.sweep(now)

    def _on_probation(self, variant: VariantRef, circuits: list[Circuit]) -> None:
        for endpoint in variant.endpoints:
            if endpoint.circuit in circuits:
                self._changed(endpoint)

    def _changed(self, endpoint: EndpointRef) -> None:
        endpoint.limit = limit_of(endpoint, endpoint.circuit)
        endpoint.variant.pool.refresh()
        if endpoint.circuit.state is not State.OPEN and self.waiting.number:
            self._loop.call_soon(self.waiting.serve, endpoint.variant.model)
