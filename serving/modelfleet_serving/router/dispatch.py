"""Chooses the engine of each request, counts it there, and holds it while none can take it."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Final

from modelfleet_serving.contract import Affinity, EndpointState
from modelfleet_serving.router.affinity import (
    Fingerprint,
    LoadView,
    PrefixAffinity,
    PrefixTable,
    fingerprint,
    prompt_kib,
)
from modelfleet_serving.router.choice import Selector, session_key
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.table import EndpointRef, ModelRef, VariantRef

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.worker import Worker

_MAY_COME: Final = frozenset({EndpointState.STARTING, EndpointState.SLEEPING, EndpointState.DRAINING})


class Dispatcher:
    """Routing decisions of one worker."""

    def __init__(self, worker: Worker, prefixes: PrefixTable) -> None:
        """``prefixes`` is shared by all workers."""
        self._worker = worker
        counters = worker.counters
        self._cells = counters.cells
        rng = random.Random()  # noqa: S311 - spreads load
        load = LoadView(counters.total, counters.total_reading)
        self._reading = counters.reading
        self._selector = Selector(load, rng, PrefixAffinity(load, rng, prefixes))
        self._held: dict[str, deque[Exchange]] = {}

    def dispatch(self, exchange: Exchange) -> None:
        """Sends a request to an engine, or holds it.

        Raises:
            RequestError: 429 or 503 when it can't be held.
        """
        model = exchange.target.model
        if model.affinity is not Affinity.NONE:
            session = exchange.request.special.get(b"x-modelfleet-session")
            if session is not None:
                exchange.session = session_key(session)
        exchange.order = model.plan.order(exchange.target.pin, exchange.session)
        endpoint = self._pick(exchange)
        if endpoint is None:
            self._hold(exchange)
        else:
            endpoint.variant.stats.requests += 1
            self.assign(exchange, endpoint)

    def alternative(self, exchange: Exchange) -> EndpointRef | None:
        """Another engine for a request that has got no byte yet, if there is one that may be tried."""
        if exchange.began or exchange.attempts >= self._worker.settings.max_attempts:
            return None
        if exchange.endpoint is not None:
            exchange.tried.append(exchange.endpoint)
        return self._pick(exchange)

    def assign(self, exchange: Exchange, endpoint: EndpointRef) -> None:
        """Counts a request on its engine before it is sent there: the next choice sees it."""
        self._cells[endpoint.cell] += 1
        prompt = exchange.prompt
        kib = prompt_kib(prompt.size - prompt.held if prompt is not None else len(exchange.request.body))
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
        if self._held:
            self._worker.loop.call_soon(self.pump, endpoint.variant.model)

    def _pick(self, exchange: Exchange) -> EndpointRef | None:
        order = exchange.order
        target = exchange.target
        for variant in order:
            pool = variant.pool
            groups = pool.groups
            prompt = None
            if exchange.session is None and groups and (len(groups) > 1 or len(groups[0].members) > 1):
                prompt = self._prompt(exchange)
            endpoint = self._selector.pick(
                pool, prompt=prompt, session=exchange.session, adapter=target.adapter, exclude=exchange.tried
            )
            if endpoint is not None:
                if variant is not order[0]:
                    exchange.fallback_from = order[0].name
                    variant.stats.fallbacks += 1
                return endpoint
        return None

    def _prompt(self, exchange: Exchange) -> Fingerprint | None:
        """What the prompt begins with, read once a request and only where there is something to choose."""
        if exchange.prompt_read:
            return exchange.prompt
        exchange.prompt_read = True
        peek = exchange.peek
        target = exchange.target
        if peek is not None and exchange.operation.generates and target.model.affinity is Affinity.PREFIX:
            raw = peek.messages or peek.prompt or peek.input
            exchange.prompt = fingerprint(raw, target.seed(exchange.salt), (peek.tools, peek.system))
        return exchange.prompt

    # --- Holding ---

    def _hold(self, exchange: Exchange) -> None:
        model = exchange.target.model
        variants = exchange.order
        if not _worth_waiting(variants, exchange.target.adapter):
            known = sum(len(variant.endpoints) for variant in variants)
            message = f"no engine of {model.name!r} can answer ({known} known, none is well)"
            raise RequestError(503, message, code="no_engine", retry_after=1.0)
        if model.queue.max_requests <= 0 or model.queue.timeout_seconds <= 0:
            message = f"every engine of {model.name!r} is busy or not ready, and requests don't wait for it"
            raise RequestError(503, message, code="no_engine", retry_after=5.0)
        queue = self._held.setdefault(model.name, deque())
        if len(queue) >= model.queue.max_requests:
            message = f"{len(queue)} requests wait for {model.name!r} already, its limit"
            raise RequestError(429, message, code="queue_full", retry_after=5.0)
        model.stats.requests += 1
        exchange.deadline = min(self._worker.loop.time() + model.queue.timeout_seconds, exchange.expires)
        queue.append(exchange)

    def pump(self, model: ModelRef) -> None:
        """Sends what waits for a model as far as its engines take it."""
        queue = self._held.get(model.name)
        plan = model.plan
        while queue:
            exchange = queue[0]
            exchange.order = plan.order(exchange.target.pin, exchange.session)
            endpoint = self._pick(exchange)
            if endpoint is None:
                return
            queue.popleft()
            self.assign(exchange, endpoint)

    def pump_all(self) -> None:
        """Does so for every model with waiting requests."""
        for name in [name for name, queue in self._held.items() if queue]:
            model = self._worker.table.models.get(name)
            if model is not None:
                self.pump(model)

    def forget(self, exchange: Exchange) -> None:
        """A waiting client is gone."""
        queue = self._held.get(exchange.target.model.name)
        if queue is not None and exchange in queue:
            queue.remove(exchange)

    def waited_too_long(self, exchange: Exchange) -> RequestError:
        """Takes a request out of its queue and says why."""
        self.forget(exchange)
        model = exchange.target.model
        return RequestError(
            504,
            f"no engine of {model.name!r} became free within {model.queue.timeout_seconds:g} s",
            code="queue_timeout",
        )


def _worth_waiting(variants: tuple[VariantRef, ...], adapter: str | None) -> bool:
    """Whether an engine may come or become free: none exists yet, one starts, or all are at their limit."""
    endpoints = [ref for variant in variants for ref in variant.endpoints]
    if not endpoints:
        return bool(variants)
    return any(ref.limit > 0 or ref.state in _MAY_COME for ref in endpoints) or adapter is not None
