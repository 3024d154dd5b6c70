"""A stand-in for a Ray cluster: Serve's REST API, and replicas that report to the real registry.

What is real in the tests that use it: the API server, the operator's process and the registry's process. What
is not: engines and Ray itself, which tests/ray and tests/e2e have. Applications "start" after a moment, their
replicas send heartbeats as a supervisor does, and what is left out of a PUT drains and goes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from modelfleet_serving.contract import (
    EndpointState,
    EngineMemory,
    Heartbeat,
    HeartbeatReply,
    parse_application_name,
)

_PATH = "/api/serve/applications/"
_T = TypeVar("_T")


@dataclass
class App:
    """One application: its configuration and its replicas."""

    config: dict[str, Any]
    state: EndpointState = EndpointState.STARTING
    generation: int = 0
    sequence: int = 0
    born: float = 0.0
    deleting: float | None = None

    @property
    def replicas(self) -> int:
        deployments = self.config.get("deployments") or [{}]
        return int(deployments[0].get("num_replicas") or 1)


@dataclass
class RayStandIn:
    """The server; all times in seconds.

    Attributes:
        registry: base URL of the registry that replicas report to; empty for none.
        token: bearer token that is asked for.
        engines: base URLs of engines, one for each replica; without any, replicas report addresses of nobody.
        start_seconds: from a PUT to readiness.
        drain_seconds: from the removal to the end.
        nodes: resources of each node that is alive; ``None`` leaves the state API out.
    """

    registry: str = ""
    token: str | None = None
    engines: Sequence[str] = ()
    start_seconds: float = 0.1
    drain_seconds: float = 0.1
    nodes: list[dict[str, float]] | None = None
    apps: dict[str, App] = field(default_factory=dict)
    puts: int = 0
    gets: int = 0
    restarted: Counter[str] = field(default_factory=Counter)
    """How often a running application was given another configuration, other than its number of replicas."""
    removed: Counter[str] = field(default_factory=Counter)
    started: Counter[str] = field(default_factory=Counter)
    down: bool = False
    never_start: set[str] = field(default_factory=set)
    """Accelerators on which nothing is placed."""
    memory: EngineMemory | None = None
    delay: float = 0.0
    """Seconds before each answer."""
    answer: tuple[int, str] | None = None
    """In place of every answer: status and body, as from a proxy or another server."""
    failed: dict[str, str] = field(default_factory=dict)
    """Message by the beginning of an application's name: such ones are DEPLOY_FAILED."""
    port: int = 0
    set_at: dict[str, float] = field(default_factory=dict)
    """Seconds since the epoch at which an application was given its present configuration."""
    _interval: float = 1.0
    _addresses: dict[str, str] = field(default_factory=dict)
    _body: bytes | None = None

    async def serve(self, port: int = 0) -> web.AppRunner:
        """Listen on loopback."""
        app = web.Application(client_max_size=256 * 2**20)
        app.router.add_get(_PATH, self._get)
        app.router.add_put(_PATH, self._put)
        app.router.add_get("/api/v0/nodes", self._get_nodes)
        app.router.add_get("/standin", self._get_own)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        return runner

    async def _check(self, request: web.Request) -> web.Response | None:
        await asyncio.sleep(self.delay)
        if self.answer is not None:
            return web.Response(status=self.answer[0], text=self.answer[1])
        if self.down:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=503)
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="wrong token")
        return None

    async def _get(self, request: web.Request) -> web.Response:
        if refusal := await self._check(request):
            return refusal
        self.gets += 1
        if self._body is None:
            self._body = msgspec.json.encode(
                {"applications": {n: self._details(a) for n, a in self.apps.items()}}
            )
        return web.Response(body=self._body, content_type="application/json")

    def _details(self, app: App) -> dict[str, Any]:
        ready = app.state == EndpointState.READY
        failure = self._failure(app.config["name"])
        status = "DEPLOY_FAILED" if failure else "RUNNING" if ready else "DEPLOYING"
        return {
            "name": app.config["name"],
            "status": "DELETING" if app.deleting is not None else status,
            "message": failure,
            "deployed_app_config": {"runtime_env": {}, **app.config},
            "deployments": {
                "Replica": {
                    "status": "HEALTHY" if ready else "UPDATING",
                    "message": "",
                    "replicas": [{"state": "RUNNING" if ready else "STARTING"}] * app.replicas,
                }
            },
        }

    def _failure(self, name: str) -> str:
        return next((text for start, text in self.failed.items() if name.startswith(start)), "")

    async def _get_nodes(self, request: web.Request) -> web.Response:
        if refusal := await self._check(request):
            return refusal
        if self.nodes is None:
            return web.Response(status=404)
        found = [
            {"node_id": str(i), "state": "ALIVE", "resources_total": r} for i, r in enumerate(self.nodes)
        ]
        return web.json_response({"result": True, "data": {"result": {"result": found}}})

    async def _get_own(self, _: web.Request) -> web.Response:
        """For measurements: what happened when, by the machine's clock."""
        return web.json_response({"puts": self.puts, "gets": self.gets, "setAt": self.set_at,
                                  "restarted": sum(self.restarted.values())})  # fmt: skip

    async def _put(self, request: web.Request) -> web.Response:
        if refusal := await self._check(request):
            return refusal
        wanted = {c["name"]: c for c in msgspec.json.decode(await request.read())["applications"]}
        now = asyncio.get_running_loop().time()
        for name, config in wanted.items():
            running = self.apps.get(name)
            if running is not None and running.deleting is not None:
                continue
            if running is None:
                self.apps[name] = App(config, born=now)
                self.started[name] += 1
                self.set_at[name] = time.time()
            elif running.config != config:
                if _engine(running.config) != _engine(config):
                    self.restarted[name] += 1
                running.config = config
                self.set_at[name] = time.time()
        for name, app in self.apps.items():
            if name not in wanted and app.deleting is None:
                app.deleting = now
                self.removed[name] += 1
        self.puts += 1
        self._body = None
        return web.Response(status=200)

    async def live(self) -> None:
        """Let time pass: start, drain, report."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        connector = aiohttp.TCPConnector(limit=16)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
            beat: dict[str, float] = {}
            while True:
                now = asyncio.get_running_loop().time()
                due = []
                for name, app in list(self.apps.items()):
                    changed = self._advance(name, app, now)
                    if changed or beat.get(name, 0.0) + self._interval <= now:
                        beat[name] = now
                        due.append((name, app))
                if self.registry and due:
                    await asyncio.gather(*(self._beat(session, name, app) for name, app in due))
                await asyncio.sleep(0.02)

    def _advance(self, name: str, app: App, now: float) -> bool:
        before = app.state
        accelerator = (app.config.get("args") or {}).get("accelerator", "CPU")
        if app.deleting is not None:
            app.state = EndpointState.DRAINING
            if now - app.deleting >= self.drain_seconds:
                del self.apps[name]
                self._body = None
                app.generation = -1  # says goodbye in its last heartbeat
                return True
        elif accelerator in self.never_start or self._failure(name):
            return False
        elif now - app.born >= self.start_seconds:
            app.state = EndpointState.READY
        if app.state != before:
            self._body = None
        return app.state != before

    def _address(self, replica: str) -> str:
        if not self.engines:
            return f"http://127.0.0.1:9/{replica}"
        if replica not in self._addresses:
            self._addresses[replica] = self.engines[len(self._addresses)]
        return self._addresses[replica]

    async def _beat(self, session: aiohttp.ClientSession, name: str, app: App) -> None:
        identity = parse_application_name(name)
        args = app.config.get("args") or {}
        if identity is None or "model" not in args or args.get("accelerator") in self.never_start:
            return
        if self._failure(name):
            return
        app.sequence += 1
        for number in range(app.replicas):
            body = Heartbeat(
                id=f"{name}#{number}@{app.born:.3f}",
                application=name,
                model=args["model"],
                url=self._address(f"{name}/{number}"),
                state=app.state,
                sequence=app.sequence,
                capacity=16,
                memory=self.memory,
                accelerator=args["accelerator"],
                gone=app.generation == -1,
            )
            try:
                async with session.post(
                    f"{self.registry}/v1/heartbeat",
                    data=msgspec.json.encode(body),
                    timeout=aiohttp.ClientTimeout(total=5),
                ) as answer:
                    if answer.status == 200:
                        reply = msgspec.json.decode(await answer.read(), type=HeartbeatReply)
                        self._interval = reply.interval_seconds
            except (aiohttp.ClientError, TimeoutError):
                pass  # a supervisor goes on without its registry, too


def _engine(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no running engine."""
    rest = {k: v for k, v in config.items() if k != "deployments" and (k, v) != ("runtime_env", {})}
    return json.loads(json.dumps(rest))  # type: ignore[no-any-return]


class RayThread:
    """The stand-in on a thread of its own, for tests without a loop."""

    def __init__(self, ray: RayStandIn) -> None:
        self.ray = ray
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ray-stand-in", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._runner = self.do(self.ray.serve(self.ray.port))
        self._live = asyncio.run_coroutine_threadsafe(self.ray.live(), self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        broken = self._live.done()
        self._live.cancel()
        self.do(self._runner.cleanup())
        self.do(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()
        if broken:
            self._live.result()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ray.port}"

    def do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def call(self, function: Callable[[], _T]) -> _T:
        async def run() -> _T:
            return function()

        return self.do(run())

    def names(self) -> set[str]:
        """Applications that run and are not being removed."""
        return self.call(lambda: {n for n, a in self.ray.apps.items() if a.deleting is None})

    def remove(self, name: str) -> None:
        """Remove an application behind the operator's back."""

        def gone() -> None:
            del self.ray.apps[name]
            self.ray._body = None

        self.call(gone)

    async def _end_tasks(self) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _main(port: int, registry: str) -> None:
    ray = RayStandIn(registry=registry, token=os.environ.get("STANDIN_TOKEN"))
    runner = await ray.serve(port)
    print(f"ray stand-in: http://127.0.0.1:{ray.port}", flush=True)
    try:
        await ray.live()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--registry", default="")
    options = parser.parse_args()
    asyncio.run(_main(options.port, options.registry))
