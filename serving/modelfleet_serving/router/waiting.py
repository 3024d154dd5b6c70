"""Requests that wait until an engine can take them: the holding queues of all models."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from modelfleet_serving.contract import EndpointState
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.holding import HoldingQueue, PriorityError, QueueFullError, parse_priority
from modelfleet_serving.router.table import EndpointRef, ModelRef, VariantRef, suspended_error

if TYPE_CHECKING:
    from modelfleet_serving.router.dispatch import Dispatcher
    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.worker import Worker

MAX_BYTES: Final = 256 * 1024 * 1024
"""Bodies that wait for one model in one worker."""
_MAY_COME: Final = frozenset({EndpointState.STARTING, EndpointState.SLEEPING, EndpointState.DRAINING})
_HIGHEST: Final = 5


class WaitingRoom:
    """The queues of one worker.

    Attributes:
        number: requests that wait.
        kept_alive: requests whose clients asked for signs of life, waiting or not.
    """

    def __init__(self, worker: Worker, dispatcher: Dispatcher) -> None:
        self._now = worker.now
        self._counters = worker.counters
        self._dispatcher = dispatcher
        self._queues: dict[str, HoldingQueue[Exchange]] = {}
        self._models: dict[str, ModelRef] = {}
        self.kept_alive: set[Exchange] = set()
        self.number = 0

    def enter(self, exchange: Exchange) -> None:
        """Lets a request wait.

        Raises:
            RequestError: 400 for a priority that is none, 429 when there is no place, 503 when waiting
                wouldn't help.
        """
        model = exchange.target.model
        limits = model.queue
        if not _worth_waiting(exchange.order, exchange.target.adapter):
            known = sum(len(variant.endpoints) for variant in exchange.order)
            message = f"no engine of {model.name!r} can answer ({known} known, none is well)"
            raise RequestError(503, message, code="no_engine", retry_after=1.0)
        if limits.max_requests <= 0 or limits.timeout_seconds <= 0:
            message = f"every engine of {model.name!r} is busy or not ready, and requests don't wait for it"
            raise RequestError(503, message, code="no_engine", retry_after=5.0)
        now = self._now()
        queue = self._queues.get(model.name)
        if queue is None:
            queue = self._queues[model.name] = HoldingQueue(limits.max_requests, MAX_BYTES)
            self._models[model.name] = model
        cell = self._counters.cell(model.row)
        cells = self._counters.cells
        # The limit holds for all workers together; each one orders its own.
        others = self._counters.total(model.row) - cells[cell]
        queue.max_requests = max(limits.max_requests - others, 0)
        deadline = min(now + limits.timeout_seconds, exchange.expires)
        try:
            exchange.ticket, pushed_out = queue.put(
                exchange,
                now=now,
                deadline=deadline,
                size=len(exchange.request.payload),
                tenant=exchange.salt,
                priority=read_priority(exchange),
                lane=_lane(exchange),
            )
        except QueueFullError as full:
            raise _full(model, full.retry_after) from None
        exchange.waits_since = now
        model.stats.requests += 1
        cells[cell] += 1
        self.number += 1
        for other in pushed_out:
            self._leave(other, model)
            other.fail(_full(model, queue.retry_after(now)))

    def serve(self, model: ModelRef) -> None:
        """Sends what waits for a model as far as its engines take it."""
        queue = self._queues.get(model.name)
        if queue is None:
            return
        now = self._now()
        blocked: set[object] = set()
        while (found := queue.take(self._choose, now, blocked)) is not None:
            exchange, endpoint = found
            self._leave(exchange, model)
            endpoint.variant.stats.queue_wait.observe(now - exchange.waits_since)
            self._dispatcher.assign(exchange, endpoint)
        self._tidy(model.name)

    def _choose(self, exchange: Exchange) -> EndpointRef | None:
        self._dispatcher.draw(exchange)
        return self._dispatcher.pick(exchange)

    def forget(self, exchange: Exchange) -> None:
        """A waiting client is gone: its place is free."""
        ticket = exchange.ticket
        if ticket is None:
            return
        model = exchange.target.model
        queue = self._queues.get(model.name)
        if queue is not None and queue.remove(ticket):
            self._leave(exchange, model)
            self._tidy(model.name)

    def sweep(self, now: float) -> None:
        """Serves what became possible, comforts who asked for it, and answers those whose time is over."""
        for exchange in tuple(self.kept_alive):
            if not exchange.comfort(now):
                self.kept_alive.discard(exchange)
        for name, model in tuple(self._models.items()):
            self.serve(model)
            queue = self._queues.get(name)
            if queue is None:
                continue
            self._dismiss(queue, model)
            for exchange in queue.expire(now):
                self._leave(exchange, model)
                exchange.fail(_too_late(exchange, now))
            self._tidy(name)

    def _dismiss(self, queue: HoldingQueue[Exchange], model: ModelRef) -> None:
        """Answers those whose model, variant or adapter is no longer in the table."""
        gone = [lane for lane in queue.lanes() if _missing(lane, model)]
        if not gone:
            return
        for exchange in queue.clear(gone):
            self._leave(exchange, model)
            target = exchange.target
            if model.suspended:
                exchange.fail(suspended_error(target.name))
                continue
            if model.variants and target.pin is not None and target.pin not in model.variants:
                code, name = "variant_not_found", f"the variant {target.pin!r} of {target.name!r}"
            else:
                code, name = "model_not_found", f"the model {target.name!r}"
            exchange.fail(RequestError(404, f"{name} is served no more", code=code, param="model"))

    def queued(self) -> dict[tuple[str, str], int]:
        """How many wait, by model and pinned variant (empty for none)."""
        counts: dict[tuple[str, str], int] = {}
        for name, queue in self._queues.items():
            for lane, number in queue.lanes().items():
                key = (name, lane[0] if isinstance(lane, tuple) else "")
                counts[key] = counts.get(key, 0) + number
        return counts

    def _leave(self, exchange: Exchange, model: ModelRef) -> None:
        exchange.ticket = None
        self.number -= 1
        self._counters.cells[self._counters.cell(model.row)] -= 1

    def _tidy(self, name: str) -> None:
        queue = self._queues.get(name)
        if queue is not None and not len(queue) and not self._models[name].variants:
            del self._queues[name], self._models[name]


def read_priority(exchange: Exchange) -> int:
    """The class of a request.

    Raises:
        RequestError: 400 for one that is none.
    """
    tenant = exchange.tenant
    try:
        return parse_priority(
            exchange.request.text("x-modelfleet-priority"),
            tenant.priority if tenant is not None else _HIGHEST,
        )
    except PriorityError as error:
        raise RequestError(400, f"x-modelfleet-priority: {error}", code="invalid_header") from error


def _lane(exchange: Exchange) -> tuple[str, ...] | None:
    """Requests of one lane wait for the same engines."""
    target = exchange.target
    tenant = exchange.tenant
    allowed = tenant.variants_of(target.name) if tenant is not None and target.pin is None else None
    if target.pin is None and target.adapter is None and allowed is None:
        return None
    return (target.pin or "", target.adapter or "", *sorted(allowed or ()))


def _missing(lane: Hashable, model: ModelRef) -> bool:
    """Whether a lane waits for what its model doesn't have any more."""
    if not model.variants or model.suspended or not isinstance(lane, tuple):
        return not model.variants or model.suspended
    pin, adapter = lane[0], lane[1]
    return bool((pin and pin not in model.variants) or (adapter and adapter not in model.adapters))


def _full(model: ModelRef, retry_after: float) -> RequestError:
    message = f"too many requests wait for {model.name!r} (at most {model.queue.max_requests})"
    return RequestError(429, message, code="queue_full", retry_after=retry_after)


def _too_late(exchange: Exchange, now: float) -> RequestError:
    if exchange.expires <= now:
        return RequestError(504, "the request's own deadline is over", code="deadline_exceeded")
    model = exchange.target.model
    message = f"no engine of {model.name!r} became free within {model.queue.timeout_seconds:g} s"
    return RequestError(504, message, code="queue_timeout")


def _worth_waiting(variants: tuple[VariantRef, ...], adapter: str | None) -> bool:
    """Whether an engine may come or become free: none exists yet, one starts, or all are at their limit."""
    endpoints = [ref for variant in variants for ref in variant.endpoints]
    if not endpoints:
        return bool(variants)
    return any(ref.limit > 0 or ref.state in _MAY_COME for ref in endpoints) or adapter is not None
