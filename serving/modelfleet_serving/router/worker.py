"""One worker process: its event loop's view of table, counters, clients and running requests."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Final, cast

from modelfleet_serving.router import failover
from modelfleet_serving.router.accesslog import AccessLog
from modelfleet_serving.router.affinity import PrefixTable
from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.dispatch import Dispatcher
from modelfleet_serving.router.hub import TableChange
from modelfleet_serving.router.observe import Snapshot, VariantStats
from modelfleet_serving.router.probe import Prober
from modelfleet_serving.router.server import ClientConnection
from modelfleet_serving.router.settings import Settings
from modelfleet_serving.router.slices import Slices
from modelfleet_serving.router.sockets import Listener, poller_of
from modelfleet_serving.router.stored import StoredResponses
from modelfleet_serving.router.table import EndpointRef, Table
from modelfleet_serving.router.tenancy import Tenancy
from modelfleet_serving.router.tls import ListenerTls
from modelfleet_serving.router.tracing import Tracing
from modelfleet_serving.router.upstream import Connector

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from modelfleet_serving.router.exchange import Exchange
    from modelfleet_serving.router.request import Request

_log = logging.getLogger(__name__)
_TWO_DIGITS: Final = [b"%02x" % number for number in range(256)]

METRICS_TYPE: Final = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"
SWEEP_SECONDS = 0.1


class Worker:
    """Everything that the requests of one process share."""

    def __init__(
        self,
        settings: Settings,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        scrape: Callable[[], Awaitable[bytes]],
    ) -> None:
        """``scrape`` renders the metrics of all workers."""
        self.settings = settings
        self.counters = counters
        self.loop = loop
        self.table = Table(self._row_of, counters.cell)
        self._rows: dict[str, int] = {}
        self._scrape = scrape
        self._tasks: set[asyncio.Task[None]] = set()
        self.now: Callable[[], float] = loop.time  # looked up once: it is asked for every chunk
        self.poller = poller_of(loop)
        self.connector = Connector(
            loop,
            self.poller,
            connect_timeout=settings.connect_timeout,
            idle_limit=settings.pool_idle,
            idle_timeout=settings.pool_idle_timeout,
            authority=settings.engine_ca,
        )
        self.tls = (
            ListenerTls(settings.tls_certificate, settings.tls_key) if settings.tls_certificate else None
        )
        self.tenancy = Tenancy(settings.tenants, counters, loop)
        self.buffered = 0  # bytes of request bodies in memory
        self.dispatcher = Dispatcher(self)
        self.stored = StoredResponses(PrefixTable(counters.prefixes))
        self.clients: set[ClientConnection] = set()
        self.active: set[Exchange] = set()
        self.access_log = AccessLog(settings.access_log, loop) if settings.access_log else None
        self.tracing = Tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
        self.draining = False
        self._idle = asyncio.Event()
        self.cors = bool(settings.cors_origins)
        self.date_line = b""
        self.refused: dict[int, int] = {}
        self._spawn(self.tenancy.follow())
        if self.tls is not None:
            self._spawn(self.tls.follow())
        self._spawn(Prober(self).run())
        self._requests = 0
        self._request_prefix = secrets.token_hex(12).encode()
        self._request_page = b""
        self._sweep_handle: asyncio.TimerHandle | None = None
        self._sweeps = 0
        self._sweep()

    async def listen(self, host: str, port: int) -> Listener | asyncio.Server:
        """Opens this worker's own listening socket: the kernel spreads connections over the workers'."""
        backlog = self.settings.backlog
        if self.tls is None:
            return await Listener.open(
                self.loop, self.poller, lambda: ClientConnection(self), host, port, backlog=backlog
            )
        return await self.loop.create_server(
            lambda: cast("asyncio.BaseProtocol", ClientConnection(self)),
            host,
            port,
            backlog=backlog,
            reuse_port=True,
            ssl=self.tls.context,
            ssl_handshake_timeout=self.settings.header_timeout,
        )

    def next_request_id(self) -> bytes:
        """An id that no other worker or router makes."""
        number = self._requests
        self._requests = number + 1
        place = number & 0xFF
        if not place:
            self._request_page = b"%b-%x" % (self._request_prefix, number >> 8)
        return self._request_page + _TWO_DIGITS[place]

    # --- The table ---

    async def change(self, change: TableChange) -> None:
        """Takes over changed models a few at a time, so that running streams notice nothing."""
        table = self.table
        self._rows = change.rows
        gone: list[EndpointRef] = []
        slices = Slices()
        for model in change.models:
            gone += table.put(model)
            await slices.pause()
        for name in change.removed:
            gone += table.remove(name)
            await slices.pause()
        if not change.more:
            table.publish()
        while gone:  # one after the other, and so is its memory
            self.connector.drop(gone.pop())
            await slices.pause()
        if not change.more:
            self.dispatcher.waiting.sweep(self.now())

    def _row_of(self, key: str) -> int:
        return self._rows.get(key, 0)

    async def snapshot(self) -> Snapshot:
        """What this worker has counted."""
        variants = [
            meter.stats()
            for model in self.table.models.values()
            for meter in (model.stats, *(variant.stats for variant in model.variants.values()))
            if meter.used
        ]
        queued = self.dispatcher.waiting.queued()
        for stats in variants:
            stats.queued = queued.pop((stats.model, stats.variant), 0)
        # Nothing has ever reached the pinned variant that some wait for: it stands here for them alone.
        variants += [
            VariantStats(model=model, variant=variant, queued=number)
            for (model, variant), number in queued.items()
        ]
        return Snapshot(
            variants=variants, refused=self.refused, connections=len(self.clients), active=len(self.active)
        )

    # --- Time ---

    def _sweep(self) -> None:
        """One timer for all requests and clients: a timer each would cost more than the request."""
        now = self.now()
        idle_limit = now - self.settings.idle_timeout
        for exchange in tuple(self.active):
            if exchange.deadline <= now or exchange.idle_since() < idle_limit:
                failover.time_out(exchange, now)
        if self._sweeps % 10 == 0:
            self.date_line = f"date: {formatdate(time.time(), usegmt=True)}\r\n".encode()
            self.connector.sweep(now)
            self.dispatcher.shared_by(self.counters.routers[0])
            for client in tuple(self.clients):
                if client.deadline <= now or client.full:
                    client.sweep(now)
        self.dispatcher.sweep(now)
        if self.access_log is not None and self._sweeps % 5 == 0:
            self.access_log.flush()
        if self.draining and not self.active:
            self._idle.set()
        self._sweeps += 1
        self._sweep_handle = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    # --- What requests ask ---

    def forwarded_headers(self, exchange: Exchange) -> bytes:
        """Further lines for the engine: credentials where they are its to check, the trace's parent."""
        special = exchange.request.special
        lines = b""
        if not self.tenancy.enabled:
            for name in (b"authorization", b"x-api-key"):
                value = special.get(name)
                if value is not None:
                    lines += name + b": " + value + b"\r\n"
        if exchange.span is not None and self.tracing is not None:
            exchange.request.drop_line(b"traceparent")
            lines += self.tracing.header(exchange.span)
        return lines

    def cors_headers(self, request: Request) -> bytes:
        """CORS header lines for the request's origin; caches must keep answers to others apart."""
        origin = request.special.get(b"origin")
        allowed = [entry.strip().encode() for entry in self.settings.cors_origins.split(",")]
        everybody = b"*" in allowed
        if origin is None or not (everybody or origin in allowed):
            return b"" if everybody else b"vary: origin\r\n"
        value = b"*" if everybody else origin
        return (
            b"access-control-allow-origin: " + value + b"\r\nvary: origin\r\n"
            b"access-control-expose-headers: x-request-id, x-modelfleet-model, x-modelfleet-variant, "
            b"x-modelfleet-replica, x-modelfleet-fallback, retry-after, "
            b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
            b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens\r\n"
        )

    def not_ready(self) -> str | None:
        """Why load balancers should send nothing here, or ``None``."""
        if self.draining:
            return "draining"
        return None if self.table.loaded else "no route table yet"

    def answer_metrics(self, exchange: Exchange) -> None:
        """Answers a scrape with the figures of all workers."""
        self._spawn(self._answer_metrics(exchange))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_metrics(self, exchange: Exchange) -> None:
        text = await self._scrape()
        if exchange.client.exchange is exchange:
            exchange.answer(200, METRICS_TYPE, text)

    # --- Accounts ---

    def count(self, exchange: Exchange) -> None:
        """Counts a finished request."""
        now = self.now()
        seconds = now - exchange.started
        reply = exchange.reply
        status = reply.status if reply is not None else 499
        endpoint = exchange.endpoint
        if endpoint is not None:
            stats = endpoint.variant.stats
            stats.duration.observe(seconds)
            if exchange.fallback_from:
                stats.fallbacks += 1
            statuses = stats.statuses
        else:
            statuses = exchange.target.model.stats.statuses if exchange.routed else self.refused
        statuses[status] = statuses.get(status, 0) + 1
        lease = exchange.lease
        if lease is not None:
            if reply is not None and reply.usage is not None:
                lease.settle(now, reply.usage[0], reply.usage[1])
            elif reply is None or reply.first_byte is None:
                lease.settle(now, 0, 0)
            else:
                # Cut off before its usage: what was delivered counts, or leaving early would be free.
                lease.settle(now, None, reply.pieces if reply.events else None)
        if self.access_log is not None:
            self.access_log.record(exchange, status, seconds)
        if exchange.span is not None and self.tracing is not None:
            self.tracing.end(exchange.span, exchange, status)

    def count_refused(self, status: int) -> None:
        """Counts a request that reached no engine."""
        self.refused[status] = self.refused.get(status, 0) + 1

    def log_failure(self, endpoint: EndpointRef, reason: str) -> None:
        """Says that an engine failed a request."""
        _log.warning(
            "engine %s of %s:%s %s", endpoint.id, endpoint.variant.model.name, endpoint.variant.name, reason
        )

    # --- The end ---

    async def drain(self, server: Listener | asyncio.Server) -> None:
        """Fails readiness, stops accepting, and waits until the last request is answered."""
        self.draining = True
        await asyncio.sleep(self.settings.drain_delay)
        server.close()
        for client in tuple(self.clients):
            client.close_when_idle()
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("drain time over: %d requests are cut off", len(self.active))
            for exchange in tuple(self.active):
                exchange.give_up()

    async def close(self) -> None:
        """Closes every connection."""
        if self._sweep_handle is not None:
            self._sweep_handle.cancel()
        for client in tuple(self.clients):
            client.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.connector.close()
        if self.access_log is not None:
            await self.access_log.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
