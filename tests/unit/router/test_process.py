"""The router as processes: its files, its signals, its workers and the registry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp.web
import msgspec
import psutil
import pytest
from tests.unit.router.harness import (
    SSE_HEAD,
    Answer,
    Client,
    Engine,
    Received,
    chunk,
    event,
    hang,
    model,
    post,
    until,
)

from modelfleet_serving.contract import DemandReport, ModelRoute, TableUpdate


class Router:
    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    async def client(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def ask(self, data: bytes) -> Answer:
        client = await self.client()
        client.send(data)
        try:
            return await client.answer()
        finally:
            await client.close()

    async def status(self, path: str) -> int:
        return (await self.ask(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())).status

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@contextlib.asynccontextmanager
async def run(directory: Path, *arguments: str) -> AsyncIterator[Router]:
    port_file, log = directory / "port", directory / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "modelfleet_serving.router", "--listen", "127.0.0.1:0",
            "--port-file", str(port_file), *arguments, stderr=output,
        )  # fmt: skip
    try:
        await until(lambda: port_file.exists() or process.returncode is not None, 20)
        assert process.returncode is None, log.read_text()
        yield Router(process, int(port_file.read_text().rpartition(":")[2]), log)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


@contextlib.asynccontextmanager
async def engine(name: str = "r1", **options: Any) -> AsyncIterator[Engine]:
    running = Engine(name, **options)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


def _write(path: Path, *models: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"models": list(models)}))
    return path


async def test_route_file_is_reread_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    async with engine() as one:
        routes = _write(tmp_path / "routes.yaml", model("a", v=[one]))  # JSON is YAML, too
        async with run(tmp_path, "--routes", str(routes)) as router:
            assert (await router.ask(post(model="a"))).status == 200
            routes.write_text(
                f"models:\n- name: b\n  variants: [{{name: v, endpoints: [{{id: r, url: '{one.url}'}}]}}]\n"
            )
            await _until_status(router, "b", 200)
            assert (await router.ask(post(model="a"))).status == 404
            for bad in (
                "models: [",
                "models: [{name: b, variants: [{name: v, endpoints: [{id: r, url: nowhere}]}]}]",
            ):
                routes.write_text(bad)
                mark = router.log.read_text().count("stays as it was")
                await until(lambda mark=mark: router.log.read_text().count("stays as it was") > mark)
                assert (await router.ask(post(model="b"))).status == 200
            assert "models[0].variants[0].endpoints[0].url: 'nowhere'" in router.log.read_text()


async def _until_status(router: Router, name: str, status: int) -> None:
    for _ in range(200):
        if (await router.ask(post(model=name))).status == status:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{name} never answered {status}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--routes"),
        (["--routes", "/nonexistent.json"], "/nonexistent.json"),
        (["--routes", "x", "--workers", "many"], "--workers: 'many'"),
        (["--routes", "x", "--tls-key", "k"], "--tls-certificate"),
        (["--routes", "x", "--tls-key", "/gone.key", "--tls-certificate", "/gone.crt"], "/gone.crt"),
        (["--routes", "x", "--tls-key", __file__, "--tls-certificate", __file__], "not a usable certificate"),
        (["--routes", "x", "--engine-ca", "/gone.pem"], "--engine-ca /gone.pem"),
        (["--routes", "x", "--health-path", "health"], "--health-path"),
        (["--routes", "x", "--health-path", "/h é"], "--health-path"),
        (["--routes", "x", "--max-attempts", "0"], "--max-attempts"),
        (["--routes", "x", "--connect-timeout", "nan"], "--connect-timeout"),
        (["--routes", "x", "--drain-timeout", "-1"], "--drain-timeout"),
    ],
)
async def test_bad_settings_are_named(arguments: list[str], message: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "modelfleet_serving.router", *arguments, stderr=asyncio.subprocess.PIPE
    )
    _, error = await process.communicate()
    assert process.returncode == 2
    assert message in error.decode()


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_finishes_what_runs(tmp_path: Path, workers: int) -> None:
    release = asyncio.Event()

    async def slow(one: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + chunk(event({"n": 1})))
        await release.wait()
        writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")

    async with engine(handler=slow) as one:
        routes = _write(tmp_path / "routes.json", model(v=[one]))
        async with run(tmp_path, "--routes", str(routes), "--workers", str(workers)) as router:
            client = await router.client()
            idle = await router.client()
            client.send(post(stream=True))
            await client.head()
            router.process.send_signal(signal.SIGTERM)
            assert await idle.closed()
            await _refused(router)
            assert router.process.returncode is None
            release.set()
            body, complete = await client.chunks()
            assert complete
            assert body.endswith(event("[DONE]"))
            assert await client.closed()
            assert await asyncio.wait_for(router.process.wait(), 5) == 0
            await asyncio.gather(client.close(), idle.close())


async def _refused(router: Router) -> None:
    for _ in range(200):
        try:
            client = await router.client()
        except ConnectionRefusedError:
            return
        await client.close()
        await asyncio.sleep(0.02)
    raise AssertionError("new connections are still accepted")


async def test_readiness_fails_before_the_listener_closes(tmp_path: Path) -> None:
    routes = _write(tmp_path / "routes.json")
    async with run(tmp_path, "--routes", str(routes), "--drain-delay", "0.5") as router:
        assert await router.status("/readyz") == 200
        router.process.send_signal(signal.SIGTERM)
        for _ in range(20):
            if await router.status("/readyz") == 503:
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError("it is still ready")
        assert await asyncio.wait_for(router.process.wait(), 5) == 0


async def test_workers_share_counts_and_a_dead_one_leaks_none(tmp_path: Path) -> None:
    async with engine(handler=hang) as one:
        table = model(v=[one])
        table["variants"][0]["endpoints"][0]["capacity"] = 4
        routes = _write(tmp_path / "routes.json", table)
        async with run(tmp_path, "--routes", str(routes), "--workers", "2") as router:
            clients = [await router.client() for _ in range(12)]
            for client in clients:
                client.send(post())
            await until(lambda: len(one.requests) == 4)
            text = (await router.ask(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")).body.decode()
            assert 'modelfleet_router_in_flight{model="m",variant="v"} 4.0' in text
            assert "modelfleet_router_workers 2.0" in text
            for worker in router.workers():
                worker.kill()
                await asyncio.sleep(0.05)
            await _until_workers(router, 2)
            for client in clients:
                await client.close()
            text = (await router.ask(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")).body.decode()
            assert 'modelfleet_router_in_flight{model="m",variant="v"} 0.0' in text
            pids = [worker.pid for worker in router.workers()]
            os.kill(router.process.pid, signal.SIGKILL)
            await until(lambda: not any(psutil.pid_exists(pid) and _runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _until_workers(router: Router, number: int) -> None:
    for _ in range(400):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            text = (await router.ask(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")).body.decode()
            if f"modelfleet_router_workers {number}.0" in text:
                return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{number} workers never came")


class Registry:
    """As much of the registry as a router needs."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[TableUpdate | int] = asyncio.Queue()
        self.polls: list[dict[str, str]] = []
        self.reports: list[DemandReport] = []
        self.port = 0
        self._runner: aiohttp.web.AppRunner | None = None

    async def start(self) -> None:
        app = aiohttp.web.Application()
        app.add_routes(
            [aiohttp.web.get("/v1/table", self._table), aiohttp.web.post("/v1/demand", self._demand)]
        )
        self._runner = aiohttp.web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = aiohttp.web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _table(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        assert request.headers["authorization"] == "Bearer secret"
        self.polls.append(dict(request.query))
        update = await self.updates.get()
        if isinstance(update, int):
            return aiohttp.web.Response(status=update)
        return aiohttp.web.Response(body=msgspec.json.encode(update), content_type="application/json")

    async def _demand(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        self.reports.append(msgspec.json.decode(await request.read(), type=DemandReport))
        return aiohttp.web.Response(status=204)


async def test_registry_is_followed_and_its_absence_survived(tmp_path: Path) -> None:
    registry = Registry()
    await registry.start()
    token = tmp_path / "token"
    token.write_text("secret\n")

    def update(
        version: int, *models: dict[str, Any], full: bool = True, removed: tuple[str, ...] = ()
    ) -> None:
        routes = msgspec.convert(list(models), list[ModelRoute])
        registry.updates.put_nowait(
            TableUpdate(epoch="e1", version=version, full=full, models=routes, removed=list(removed))
        )

    async with engine() as one:
        arguments = (
            "--registry",
            f"http://127.0.0.1:{registry.port}",
            "--token-file",
            str(token),
            "--router-id",
            "r",
        )
        async with run(tmp_path, *arguments) as router:
            assert await router.status("/healthz") == 200
            assert await router.status("/readyz") == 503
            update(1, model("a", v=[one]), model("b", v=[one]))
            await _until_status(router, "a", 200)
            assert await router.status("/readyz") == 200
            update(2, model("c", v=[one]), full=False, removed=("b",))
            await _until_status(router, "c", 200)
            assert (await router.ask(post(model="b"))).status == 404
            assert (await router.ask(post(model="a"))).status == 200
            registry.updates.put_nowait(304)
            await until(lambda: len(registry.polls) == 4)
            assert registry.polls[-1] == {"epoch": "e1", "version": "2", "timeout": "30", "router": "r"}
            await until(lambda: sum(d.requests for r in registry.reports for d in r.models) >= 3)
            assert registry.reports[-1].router == "r"
            assert (registry.reports[-1].epoch, registry.reports[-1].version) == ("e1", 2)
            await registry.stop()
            assert (await router.ask(post(model="a"))).status == 200
            while not registry.updates.empty():
                registry.updates.get_nowait()
            await registry.start()
            update(3, model("d", v=[one]))
            await _until_status(router, "d", 200)
    await registry.stop()
