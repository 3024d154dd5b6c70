"""The registry's HTTP server; its interface is described in :mod:`modelfleet_serving.contract`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web

from modelfleet_serving.contract import HEADER_TERM, DemandReport, Heartbeat, RouteSpec
from modelfleet_serving.registry.endpoints import TooManyError, UnknownApplicationError
from modelfleet_serving.registry.metrics import RegistryMetrics
from modelfleet_serving.registry.routes import InvalidRouteError, RouteConflictError
from modelfleet_serving.registry.state import Registry, Settings, SupersededError

_log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 4 * 2**20
MAX_POLLS: Final = 4_000
MAX_POLL_SECONDS: Final = 60.0
MAX_ID_LENGTH: Final = 256
TICK_SECONDS: Final = 0.25
PUBLISH_SECONDS: Final = 0.02
"""Changes that come within so long are told together: a burst of heartbeats isn't told one by one."""
BIND_RETRY_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 2.0
_JSON: Final = "application/json"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PortTakenError(OSError):
    """Somebody else listens on the port and doesn't go away."""


class _Bell:
    """Wakes everybody who waits, as often as it is rung, but not more often than :data:`PUBLISH_SECONDS`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._scheduled = False
        self._last = 0.0

    def ring(self) -> None:
        """Wake them, now or a moment later."""
        if self._scheduled:
            return
        self._scheduled = True
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, self._last + PUBLISH_SECONDS - loop.time()), self._ring)

    def _ring(self) -> None:
        self._scheduled = False
        self._last = asyncio.get_running_loop().time()
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, until: float) -> bool:
        """Wait for the next ring; whether it came before ``until`` (loop time)."""
        event = self._event
        try:
            async with asyncio.timeout_at(until):
                await event.wait()
        except TimeoutError:
            return False
        return True


class RegistryServer:
    """One registry and its server.

    Args:
        token: bearer token that every call but ``/healthz`` must carry; ``None`` asks for none.
        settings: times and bounds.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        token: str | None,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = Registry(epoch=secrets.token_hex(8), now=clock(), settings=settings)
        self.port = 0
        """Once it listens."""
        self._expected = f"Bearer {token}".encode() if token is not None else None
        self._clock = clock
        self._table_bell = _Bell()
        self._state_bell = _Bell()
        self._told = (self.registry.table.version, self.registry.state_version, True)
        self._polls = 0
        self._stopping = asyncio.Event()
        self._metrics = RegistryMetrics(self.registry, clock, lambda: self._polls)

    @contextlib.asynccontextmanager
    async def running(self, host: str, port: int, bind_seconds: float = 0.0) -> AsyncIterator[None]:
        """Listen while the context lasts.

        Args:
            host: address to listen on.
            port: likewise; 0 takes a free one.
            bind_seconds: how long to wait for a predecessor to let go of the port.

        Raises:
            PortTakenError: it doesn't.
        """
        listener = await _bind(host, port, bind_seconds)
        self.port = listener.getsockname()[1]
        # A handler is cancelled when its client goes away: an open poll shows that a router lives.
        runner = web.AppRunner(
            self.application(), access_log=None, handler_cancellation=True, shutdown_timeout=_STOP_SECONDS
        )
        await runner.setup()
        await web.SockSite(runner, listener, backlog=4096).start()
        ticking = asyncio.create_task(self._tick(), name="registry-tick")
        _log.info("registry %s listens on %s:%d", self.registry.epoch, host, self.port)
        try:
            yield
        finally:
            self._stopping.set()
            self._table_bell.ring()
            self._state_bell.ring()
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            await runner.cleanup()

    def application(self) -> web.Application:
        """Routes and middleware."""
        app = web.Application(
            middlewares=[self._count, self._authenticate, _explain], client_max_size=MAX_BODY_BYTES
        )
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/metrics", self._show_metrics),
                web.post("/v1/heartbeat", self._heartbeat),
                web.get("/v1/presence/{replica}", self._presence),
                web.put("/v1/routes/{namespace}/{name}", self._put_route),
                web.delete("/v1/routes/{namespace}/{name}", self._delete_route),
                web.post("/v1/routes/complete", self._complete_routes),
                web.get("/v1/table", self._table),
                web.get("/v1/state", self._state),
                web.post("/v1/demand", self._demand),
            ]
        )
        return app

    # --- calls ---------------------------------------------------------------------------------

    async def _heartbeat(self, request: web.Request) -> web.StreamResponse:
        heartbeat = msgspec.json.decode(await request.read(), type=Heartbeat)
        _check_id(heartbeat.id)
        reply = self.registry.heartbeat(heartbeat, self._clock())
        self._metrics.heartbeats.inc()
        self._tell()
        return web.Response(body=msgspec.json.encode(reply), content_type=_JSON)

    async def _presence(self, request: web.Request) -> web.StreamResponse:
        """Held open by a replica: a process that is killed can't say goodbye, but its connections end."""
        replica = request.match_info["replica"]
        _check_id(replica)
        self.registry.connected(replica)
        try:
            answer = web.StreamResponse()
            await answer.prepare(request)
            await self._stopping.wait()
        finally:
            self.registry.disconnected(replica, self._clock())
        return answer

    async def _put_route(self, request: web.Request) -> web.StreamResponse:
        spec = msgspec.json.decode(await request.read(), type=RouteSpec)
        self._heed(request)
        where = (request.match_info["namespace"], request.match_info["name"])
        if (spec.namespace, spec.deployment) != where:
            raise InvalidRouteError(
                f"the route of {spec.namespace}/{spec.deployment} is put at {'/'.join(where)}"
            )
        self.registry.put_route(spec, self._clock())
        self._tell()
        return web.Response(status=204)

    async def _delete_route(self, request: web.Request) -> web.StreamResponse:
        self._heed(request)
        self.registry.delete_route(request.match_info["namespace"], request.match_info["name"])
        self._tell()
        return web.Response(status=204)

    async def _complete_routes(self, request: web.Request) -> web.StreamResponse:
        self._heed(request)
        self.registry.complete_routes()
        return web.Response(status=204)

    async def _demand(self, request: web.Request) -> web.StreamResponse:
        report = msgspec.json.decode(await request.read(), type=DemandReport)
        _check_id(report.router)
        reply = self.registry.demand(report, self._clock())
        self._tell()
        return web.Response(body=msgspec.json.encode(reply), content_type=_JSON)

    async def _table(self, request: web.Request) -> web.StreamResponse:
        epoch, version, until = _poll_query(request)
        router = request.query.get("router", "")
        with self._poll(router, epoch, version):
            while self.registry.warming or self.registry.table.is_current(epoch, version):
                if self._stopping.is_set() or not await self._table_bell.wait(until):
                    return web.Response(status=304)
            body = self.registry.table.encoded_since(epoch, version)
            return web.Response(body=body, content_type=_JSON)

    async def _state(self, request: web.Request) -> web.StreamResponse:
        epoch, version, until = _poll_query(request)
        with contextlib.suppress(SupersededError):  # it may look, and learns so that it is replaced
            self._heed(request)
        with self._poll("", epoch, version):
            while epoch == self.registry.epoch and version == self.registry.state_version:
                if self._stopping.is_set() or not await self._state_bell.wait(until):
                    return web.Response(status=304)
            body = msgspec.json.encode(self.registry.state(self._clock()))
            return web.Response(body=body, content_type=_JSON)

    async def _healthz(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _show_metrics(self, _request: web.Request) -> web.StreamResponse:
        body, content_type = self._metrics.exposition()
        return web.Response(body=body, headers={"content-type": content_type})

    def _heed(self, request: web.Request) -> None:
        """Take in whose leadership an operator speaks for, where it says so."""
        term = request.headers.get(HEADER_TERM)
        if term is None:
            return
        if not term.isdecimal():
            raise _BadRequestError(f"{HEADER_TERM}: {term!r} is no number")
        self.registry.heed(int(term))

    # --- inner parts ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _poll(self, router: str, epoch: str, version: int) -> Any:
        if self._polls >= MAX_POLLS:
            raise TooManyError(f"{MAX_POLLS} long polls are open")
        if router:
            _check_id(router)
            self.registry.open_poll(router, epoch, version, self._clock())
        self._polls += 1
        self._tell()
        try:
            yield
        finally:
            self._polls -= 1
            if router:
                self.registry.close_poll(router, self._clock())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.registry.tick(self._clock())
            self._tell()

    def _tell(self) -> None:
        """Wake those who wait for what has changed."""
        now = (self.registry.table.version, self.registry.state_version, self.registry.warming)
        if now[0] != self._told[0] or now[2] != self._told[2]:
            self._table_bell.ring()
        if now != self._told:
            self._state_bell.ring()
        self._told = now

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._expected is not None and request.path != "/healthz":
            given = request.headers.get("authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, self._expected):
                return _error(401, "the bearer token is missing or wrong", {"www-authenticate": "Bearer"})
        return await handler(request)

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        answer = await handler(request)
        resource = request.match_info.route.resource
        self._metrics.requests.labels(
            request.method, resource.canonical if resource is not None else "", answer.status
        ).inc()
        return answer


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what went wrong into an answer."""
    try:
        return await handler(request)
    except RouteConflictError as error:
        return _error(409, str(error))
    except SupersededError as error:
        return _error(412, str(error))
    except TooManyError as error:
        return _error(429, str(error), {"retry-after": "5"})
    except (msgspec.DecodeError, InvalidRouteError, UnknownApplicationError, _BadRequestError) as error:
        return _error(400, str(error))
    except web.HTTPException as error:
        return _error(error.status, error.reason, error.headers if error.status == 405 else None)


class _BadRequestError(ValueError):
    pass


def _error(status: int, message: str, headers: Any = None) -> web.Response:
    allowed = {
        k: v for k, v in (headers or {}).items() if k.lower() not in ("content-type", "content-length")
    }
    body = msgspec.json.encode({"error": message})
    return web.Response(status=status, body=body, content_type=_JSON, headers=allowed)


def _poll_query(request: web.Request) -> tuple[str, int, float]:
    """Epoch, version and the loop time until which to wait."""
    query = request.query
    try:
        version = int(query.get("version", "-1"))
        seconds = float(query.get("timeout", "0"))
    except ValueError as error:
        raise _BadRequestError(f"version and timeout must be numbers: {error}") from error
    if not 0 <= seconds <= MAX_POLL_SECONDS:
        raise _BadRequestError(f"timeout: {seconds:g} is not between 0 and {MAX_POLL_SECONDS:g} seconds")
    return query.get("epoch", ""), version, asyncio.get_running_loop().time() + seconds


def _check_id(name: str) -> None:
    if not name or len(name) > MAX_ID_LENGTH or not name.isprintable():
        raise _BadRequestError(f"an id must be 1 to {MAX_ID_LENGTH} printable characters")


async def _bind(host: str, port: int, limit_seconds: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_seconds
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    while True:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # Two sockets may be bound to a port with SO_REUSEADDR; only one can listen.
            listener.listen(4096)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            if loop.time() >= deadline:
                raise PortTakenError(error.errno, f"{host}:{port} is taken by another process") from error
            await asyncio.sleep(BIND_RETRY_SECONDS)
            continue
        listener.setblocking(False)
        return listener
