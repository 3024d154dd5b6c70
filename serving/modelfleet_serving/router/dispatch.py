"""Chooses the engine of each request, counts it there, and holds it while none can take it."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.table import EndpointRef, ModelRef, VariantRef

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.worker import Worker


class Dispatcher:
    """Routing decisions of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._counters = worker.counters
        self._cells = worker.counters.cells
        self._held: dict[str, deque[Exchange]] = {}

    def dispatch(self, exchange: Exchange) -> None:
        """Sends a request to an engine, or holds it.

        Raises:
            RequestError: 429 or 503 when it can't be held.
        """
        endpoint = self._choose(exchange)
        if endpoint is None:
            self._hold(exchange)
            return
        self._cells[endpoint.cell] += 1
        exchange.run_on(endpoint)

    def may_retry(self, exchange: Exchange) -> bool:
        """Whether another engine may be tried for a request that has got no byte yet."""
        if exchange.began or exchange.attempts >= self._worker.settings.max_attempts:
            return False
        endpoint = exchange.endpoint
        return any(
            candidate is not endpoint
            for variant in self._variants(exchange)
            for candidate in self._candidates(exchange, variant)
        )

    def released(self, endpoint: EndpointRef) -> None:
        """A request has left an engine: another one may take its place."""
        self._cells[endpoint.cell] -= 1
        if self._held:
            self._worker.loop.call_soon(self.pump, endpoint.variant.model)

    # --- Choice ---

    def _choose(self, exchange: Exchange) -> EndpointRef | None:
        first: VariantRef | None = None
        for variant in self._variants(exchange):
            first = first or variant
            candidates = self._candidates(exchange, variant)
            if candidates:
                exchange.variant = variant
                exchange.fallback_from = first.name if variant is not first else None
                return self._pick(candidates)
        return None

    def _variants(self, exchange: Exchange) -> list[VariantRef]:
        target = exchange.target
        model = target.model
        if target.pin is not None:
            variant = model.variants.get(target.pin)
            return [variant] if variant else []
        chosen = exchange.variant.name if exchange.variant else self._draw(model)
        if exchange.fallback_from:
            chosen = exchange.fallback_from
        names = [chosen, *(name for name in model.fallback if name != chosen)]
        return [model.variants[name] for name in names if name in model.variants]

    def _draw(self, model: ModelRef) -> str:
        weights = {
            name: weight for name, weight in model.weights.items() if weight > 0 and name in model.variants
        }
        if not weights:
            weights = dict.fromkeys(model.variants, 1)
        if not weights:
            return ""
        return random.choices(list(weights), list(weights.values()))[0]  # noqa: S311

    def _candidates(self, exchange: Exchange, variant: VariantRef) -> list[EndpointRef]:
        tried = exchange.tried
        adapter = exchange.target.adapter
        listed = adapter is not None and any(ref.adapters for ref in variant.endpoints)
        total = self._counters.total
        return [
            ref
            for ref in variant.endpoints
            if ref.ready
            and ref not in tried
            and (not listed or adapter in ref.adapters)
            and (ref.capacity is None or total(ref.row) < ref.capacity)
        ]

    def _pick(self, candidates: list[EndpointRef]) -> EndpointRef:
        if len(candidates) == 1:
            return candidates[0]
        one, other = random.sample(candidates, 2)
        return one if self._counters.total(one.row) <= self._counters.total(other.row) else other

    # --- Holding ---

    def _hold(self, exchange: Exchange) -> None:
        model = exchange.target.model
        if exchange.tried:
            raise RequestError(
                503, f"no engine of {model.name!r} can answer", code="no_engine", retry_after=1.0
            )
        states = [ref for variant in self._variants(exchange) for ref in variant.endpoints]
        queue = self._held.setdefault(model.name, deque())
        if model.queue.max_requests <= 0 or model.queue.timeout_seconds <= 0:
            raise RequestError(
                503,
                f"no engine of {model.name!r} is ready ({len(states)} known)",
                code="no_engine",
                retry_after=5.0,
            )
        if len(queue) >= model.queue.max_requests:
            raise RequestError(
                429,
                f"{len(queue)} requests wait for {model.name!r} already, its limit",
                code="queue_full",
                retry_after=5.0,
            )
        exchange.deadline = min(self._worker.loop.time() + model.queue.timeout_seconds, exchange.expires)
        queue.append(exchange)

    def pump(self, model: ModelRef) -> None:
        """Sends what waits for a model as far as its engines take it."""
        queue = self._held.get(model.name)
        while queue:
            exchange = queue[0]
            endpoint = self._choose(exchange)
            if endpoint is None:
                return
            queue.popleft()
            self._cells[endpoint.cell] += 1
            exchange.run_on(endpoint)

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
