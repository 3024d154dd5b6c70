"""Trouble between a client and the API server: injected errors, cut and silent watches.

A reverse proxy in front of the control plane. The program under test gets a kubeconfig that leads through it;
everyone else keeps the straight way.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import ssl
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import yaml
from aiohttp import web
from tests.controlplane.bed.control_plane import ControlPlane

_HOP_BY_HOP = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_REASONS = {
    403: "Forbidden",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    504: "Timeout",
}
_T = TypeVar("_T")


@dataclass
class Fault:
    """An error answered in place of the API server, which then never sees the request.

    Attributes:
        status: the HTTP status.
        methods: of which requests; empty for all.
        path: a regular expression that is searched in path and query.
        times: how often; None for as long as it is there.
        probability: of each matching request.
        retry_after: seconds in the ``Retry-After`` header; the API server sends 1 with its own 429.
    """

    status: int
    methods: frozenset[str] = field(default_factory=frozenset)
    path: str = ""
    times: int | None = None
    probability: float = 1.0
    retry_after: int | None = None

    def matches(self, method: str, path: str) -> bool:
        """Whether it is meant for this request."""
        return (not self.methods or method in self.methods) and re.search(self.path, path) is not None


class FaultProxy:
    """A proxy to a control plane that can be told to misbehave, from any thread.

    Args:
        control_plane: where requests go.
        seed: for the faults' probabilities, so that a run can be repeated.
    """

    def __init__(self, control_plane: ControlPlane, *, seed: int = 0) -> None:
        self._control_plane = control_plane
        self._port = control_plane.ports.take()
        self._faults: list[Fault] = []
        self._random = random.Random(seed)
        self._clients: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._watches: set[asyncio.Transport] = set()  # HTTP/1.1: one request at a time on each
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.injected: Counter[int] = Counter()
        """How many answers of each status it gave in the API server's place."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._runner, self._session = self._do(self._serve())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut_watches()
        self._do(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    @property
    def url(self) -> str:
        """Its address, in place of the API server's."""
        return f"https://127.0.0.1:{self._port}"

    @property
    def watches(self) -> int:
        """How many watches are open through it."""
        return len(self._watches)

    def kubeconfig(self, original: Path) -> Path:
        """A copy of a kubeconfig that leads through the proxy.

        Raises:
            ValueError: it authenticates with a certificate, which a proxy can't pass on; use
                `ControlPlane.service_account_kubeconfig`.
        """
        config = yaml.safe_load(original.read_text())
        if "token" not in config["users"][0]["user"]:
            raise ValueError(f"{original} has no token")
        config["clusters"][0]["cluster"]["server"] = self.url
        path = self._control_plane.work / f"faults-{secrets.token_hex(4)}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
        return path

    def inject(self, fault: Fault) -> None:
        """Answer with this fault from now on; of several that match, the first given is taken."""
        self._call(lambda: self._faults.append(fault))

    def clear(self) -> None:
        """Misbehave no longer."""
        self._call(self._faults.clear)
        self.thaw_watches()

    def cut_watches(self) -> int:
        """Reset the connections of all open watches and return how many there were."""
        return self._call(self._cut)

    def freeze_watches(self) -> None:
        """Hold back all events: watches stay open and say nothing, as behind a lossy load balancer."""
        self._call(self._flowing.clear)

    def thaw_watches(self) -> None:
        """Let events through again, those held back first."""
        self._call(self._flowing.set)

    def _cut(self) -> int:
        open_now = list(self._watches)
        for transport in open_now:
            transport.abort()
        return len(open_now)

    async def _serve(self) -> tuple[web.AppRunner, aiohttp.ClientSession]:
        trusted = ssl.create_default_context(cafile=str(self._control_plane.ca_file))
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trusted, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=10),
            auto_decompress=False,
        )
        own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        own.load_cert_chain(*self._control_plane.serving_certificate("127.0.0.1"))
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port, ssl_context=own).start()
        return runner, session

    async def _shut_down(self) -> None:
        # A client that was killed does not say goodbye, and TLS would wait for it.
        for transport in list(self._clients):
            transport.abort()
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self._fault(request)
        if fault is not None:
            self.injected[fault.status] += 1
            return _refusal(fault)
        transport = request.transport
        assert transport is not None
        self._clients.add(transport)
        try:
            return await self._forward(request, transport)
        except aiohttp.ClientError:
            # The API server is away: the client loses its connection, as it would without us.
            transport.abort()
            return web.Response(status=502)
        finally:
            self._watches.discard(transport)

    def _fault(self, request: web.Request) -> Fault | None:
        for fault in self._faults:
            if not fault.matches(request.method, request.path_qs) or fault.times == 0:
                continue
            if self._random.random() < fault.probability:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    async def _forward(self, request: web.Request, transport: asyncio.Transport) -> web.StreamResponse:
        is_watch = request.query.get("watch") in ("1", "true")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with self._session.request(
            request.method,
            f"{self._control_plane.url}{request.raw_path}",
            headers=headers,
            data=await request.read() if request.can_read_body else None,
            allow_redirects=False,
        ) as answer:
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    response.headers.add(name, value)
            await response.prepare(request)
            if is_watch:
                # Not before: a client repeats by itself a request that was cut before its answer began.
                self._watches.add(transport)
            async for chunk in answer.content.iter_any():
                if is_watch:
                    await self._flowing.wait()
                await response.write(chunk)
            await response.write_eof()
            return response

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def _call(self, function: Callable[[], _T]) -> _T:
        async def run() -> _T:
            return function()

        return self._do(run())


def _refusal(fault: Fault) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "injected by the test bed",
        "reason": _REASONS.get(fault.status, "Unknown"),
        "code": fault.status,
    }
    headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
    return web.json_response(body, status=fault.status, headers=headers)
