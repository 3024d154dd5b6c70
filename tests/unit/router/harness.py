"""A router in the test's own event loop, engines that do as they are told, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from modelfleet_serving.contract import RouteTable, TableUpdate
from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.hub import Hub
from modelfleet_serving.router.observe import VariantStats
from modelfleet_serving.router.settings import Settings
from modelfleet_serving.router.worker import Worker

TIMEOUT = 10.0


@dataclass
class Received:
    """A request as an engine got it."""

    line: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Handler = Callable[["Engine", Received, asyncio.StreamWriter], Awaitable[None]]


async def answer_json(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"engine": engine.name, "usage": {"prompt_tokens": 3, "completion_tokens": 5}}).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )


def answer_status(status: int) -> Handler:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\nno" % status)

    return handler


async def hang(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def die(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return b"data: " + text.encode() + b"\n\n"


def stream(*events: Any, pause: float = 0.0) -> Handler:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for entry in events:
            writer.write(chunk(event(entry)))
            await writer.drain()
            await asyncio.sleep(pause)
        writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")

    return handler


@dataclass
class Engine:
    """An HTTP server whose handler writes raw bytes."""

    name: str
    handler: Handler = answer_json
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    extra: bytes = b""
    """What came behind a request: bytes in a tunnel."""
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while True:
                request = await self._read(reader)
                self.requests.append(request)
                work = asyncio.ensure_future(self.handler(self, request, writer))
                gone = asyncio.ensure_future(self._gone(reader))
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self.closed.set()
                    work.cancel()
                    return
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await gone
                work.result()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            self.closed.set()
        finally:
            writer.close()

    async def _gone(self, reader: asyncio.StreamReader) -> None:
        """Returns when the router closes the connection while the handler works."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                self.extra += data

    async def _read(self, reader: asyncio.StreamReader) -> Received:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (entry.partition(":") for entry in lines if entry)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Received(line, headers, body)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class Answer:
    """An answer as the client got it."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        return error


class Client:
    """One connection, in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), TIMEOUT)).decode("latin-1")
        line, *lines = head.split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (entry.partition(":") for entry in lines if entry)}
        return int(line.split(" ")[1]), headers

    async def answer(self, *, head_only: bool = False) -> Answer:
        status, headers = await self.head()
        if head_only or status in (204, 304) or status < 200:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            body, complete = await self.chunks()
            return Answer(status, headers, body, complete)
        if "content-length" in headers:
            body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), TIMEOUT)
            return Answer(status, headers, body)
        return Answer(status, headers, await asyncio.wait_for(self.reader.read(), TIMEOUT))

    async def chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while True:
                line = await asyncio.wait_for(self.reader.readuntil(b"\r\n"), TIMEOUT)
                size = int(line.partition(b";")[0], 16)
                while not size and line != b"\r\n":  # trailers
                    line = await asyncio.wait_for(self.reader.readuntil(b"\r\n"), TIMEOUT)
                    assert line == b"\r\n" or b":" in line
                if not size:
                    return body, True
                data = await asyncio.wait_for(self.reader.readexactly(size + 2), TIMEOUT)
                assert data.endswith(b"\r\n")
                body += data[:-2]
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return body, False

    async def closed(self) -> bool:
        """Waits until the router closes the connection."""
        try:
            return await asyncio.wait_for(self.reader.read(), TIMEOUT) == b""
        except ConnectionResetError:
            return True

    async def close(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def post(
    path: str = "/v1/chat/completions", body: Any = None, headers: dict[str, str] | None = None, **fields: Any
) -> bytes:
    """A request's bytes; ``messages`` stands before ``model``, as the openai package sends it."""
    if body is None:
        body = {"messages": [{"role": "user", "content": "hi"}], "model": "m", **fields}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "host": "router",
        "content-type": "application/json",
        "content-length": str(len(data)),
        **(headers or {}),
    }
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return head.encode() + b"\r\n" + data


class Harness:
    """A router with its engines and clients; everything is closed at the end of the test."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.clients: list[Client] = []
        self.hub: Hub
        self.worker: Worker
        self.port = 0
        self._server: asyncio.Server
        self._version = 0

    async def start(self, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.hub = Hub(Counters(), "test")
        settings.setdefault("health_interval", 0)
        self.worker = Worker(Settings(routes="-", **settings), self.hub.counters, loop, self.hub.metrics)
        await self.hub.join(self.worker)
        self._server = await self.worker.listen("127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def engine(self, name: str, handler: Handler = answer_json) -> Engine:
        engine = Engine(name, handler)
        await engine.start()
        self.engines.append(engine)
        return engine

    async def table(self, *models: dict[str, Any]) -> None:
        self._version += 1
        table = msgspec.convert({"models": list(models)}, RouteTable)
        await self.hub.apply(TableUpdate(epoch="t", version=self._version, full=True, models=table.models))

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes | None = None, **fields: Any) -> Answer:
        client = await self.client()
        client.send(data if data is not None else post(**fields))
        return await client.answer()

    async def stats(self) -> VariantStats:
        """Counters of the first variant that requests have reached."""
        return next(stats for stats in (await self.hub.snapshot()).variants if stats.variant)

    async def stop(self) -> None:
        for client in self.clients:
            await client.close()
        self._server.close()
        await self.worker.close()
        for engine in self.engines:
            await engine.stop()
        await asyncio.sleep(0)
        self.hub.counters.close()


def model(name: str = "m", *, weights: dict[str, int] | None = None, **rest: Any) -> dict[str, Any]:
    """A model of the route table; keywords that hold engines are its variants."""
    variants = []
    settings = {}
    for key, value in rest.items():
        if isinstance(value, list) and all(isinstance(entry, Engine) for entry in value):
            endpoints = [{"id": entry.name, "url": entry.url} for entry in value]
            variants.append({"name": key, "endpoints": endpoints})
        else:
            settings[key] = value
    return {"name": name, "weights": weights or {}, "variants": variants, **settings}


async def until(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Waits for a condition, failing when it doesn't come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def harness(**settings: Any) -> AsyncIterator[Harness]:
    """A running router."""
    router = Harness()
    await router.start(**settings)
    try:
        yield router
    finally:
        await router.stop()
