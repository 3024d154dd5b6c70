"""The simulator's HTTP interface."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import signal
import socket
from collections.abc import Callable
from typing import Any, Final

import msgspec

from modelfleet_serving.simulator import generate, pooling
from modelfleet_serving.simulator.config import Config
from modelfleet_serving.simulator.engine import Engine
from modelfleet_serving.simulator.faults import Fate, Faults, changed
from modelfleet_serving.simulator.generate import Job, error
from modelfleet_serving.simulator.http import SERVER, Exchange, HttpProtocol
from modelfleet_serving.simulator.pooling import PoolingJob
from modelfleet_serving.simulator.requests import (
    AdapterRequest,
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
    chat_tokens,
    read,
)
from modelfleet_serving.simulator.tokens import decode, encode

Handler = Callable[[Exchange], None]
BACKLOG: Final = 4096
FLUSH_SECONDS: Final = 2.0
"""What a slow reader gets at the end to take what is written already."""

_EMBED: Final = ("/v1/embeddings",)
_SCORE: Final = ("/score", "/v1/score")
_RERANK: Final = ("/rerank", "/v1/rerank", "/v2/rerank")
_CLASSIFY: Final = ("/classify",)
TASK_PATHS: Final = {
    "generate": ("/v1/chat/completions", "/v1/completions"),
    "embed": (*_EMBED, *_SCORE, *_RERANK),
    "rerank": (*_RERANK, *_SCORE),
    "score": (*_RERANK, *_SCORE),
    "classify": _CLASSIFY,
}
"""Paths that each task serves. ``any`` serves them all."""


class Simulator:
    """An engine behind an OpenAI interface."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine = Engine(config)
        self.adapters = dict(config.adapters)
        self.draining = False
        self.port = config.port
        self._connections: set[HttpProtocol] = set()
        self._started = int(self.engine.wall_clock())
        self._routes = self._all_routes()

    # --- life ---

    async def serve(self, *, ready: Callable[[], None] | None = None) -> None:
        """Serves until SIGTERM or SIGINT, then lets running requests end, ``shutdown_timeout`` at most."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if self.config.start_delay:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.config.start_delay)
            if stop.is_set():
                return
        server = await loop.create_server(
            lambda: HttpProtocol(self._handle, self._connections),
            self.config.host,
            self.config.port,
            backlog=BACKLOG,
        )
        self.port = _port(server.sockets[0])
        running = asyncio.create_task(self.engine.run(), name="engine")
        failed = asyncio.create_task(stop.wait(), name="stop")
        try:
            if ready is not None:
                ready()
            await asyncio.wait((running, failed), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running  # an error of the simulation itself ends the process, loudly
            await self._drain()
        finally:
            server.close()
            running.cancel()
            failed.cancel()
            for connection in list(self._connections):
                connection.abort()
            await asyncio.gather(running, failed, return_exceptions=True)

    async def _drain(self) -> None:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.engine.idle.wait(), self.config.shutdown_timeout)
        for sequence in list(self.engine.scheduler.sequences()):
            self.engine.abort(sequence)
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                for connection in connections:
                    await connection.lost.wait()

    # --- requests ---

    def _all_routes(self) -> dict[tuple[str, str], Handler]:
        tasks = TASK_PATHS if self.config.task == "any" else {self.config.task: TASK_PATHS[self.config.task]}
        served = {path for paths in tasks.values() for path in paths}
        inference: dict[str, Handler] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            **dict.fromkeys(_EMBED, self._pooled(EmbeddingRequest, pooling.embeddings)),
            **dict.fromkeys(_CLASSIFY, self._pooled(EmbeddingRequest, pooling.classify)),
            **dict.fromkeys(_RERANK, self._pooled(RerankRequest, pooling.rerank)),
            **dict.fromkeys(_SCORE, self._pooled(ScoreRequest, pooling.score)),
        }
        routes = {("POST", path): handler for path, handler in inference.items() if path in served}
        return routes | {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("GET", "/v1/models"): self._models,
            ("GET", "/version"): self._version,
            ("GET", "/load"): self._load,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/v1/load_lora_adapter"): self._load_adapter,
            ("POST", "/v1/unload_lora_adapter"): self._unload_adapter,
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake_up"): self._wake_up,
            ("GET", "/is_sleeping"): self._is_sleeping,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("GET", "/simulator/faults"): self._faults,
            ("POST", "/simulator/faults"): self._set_faults,
            ("DELETE", "/simulator/faults"): self._clear_faults,
        }

    def _handle(self, exchange: Exchange) -> None:
        request = exchange.request
        method = "GET" if request.method == "HEAD" else request.method
        handler = self._routes.get((method, request.path))
        if handler is None:
            known = [verb for verb, path in self._routes if path == request.path]
            if known:
                allow = f"allow: {', '.join(known)}\r\n"
                exchange.send(405, error("Method Not Allowed", "MethodNotAllowedError", 405), headers=allow)
            else:
                exchange.send(404, error("Not Found", "NotFoundError", 404))
            return
        try:
            handler(exchange)
        except BadRequestError as problem:
            exchange.send(400, error(str(problem), "BadRequestError", 400, problem.param))

    def _chat(self, exchange: Exchange) -> None:
        fate = self._admit(exchange)
        if fate is None:
            return
        request = read(exchange.request.body, ChatRequest)
        adapter = self._adapter(exchange, request.model)
        if adapter is None:
            return
        job = Job(self.engine, exchange, request, fate, "chatcmpl")
        job.add(generate.chat_plan(self.engine, request, adapter), adapter)
        self._start(job, fate)

    def _completions(self, exchange: Exchange) -> None:
        fate = self._admit(exchange)
        if fate is None:
            return
        request = read(exchange.request.body, CompletionRequest)
        adapter = self._adapter(exchange, request.model)
        if adapter is None:
            return
        job = Job(self.engine, exchange, request, fate, "cmpl")
        for plan in generate.completion_plans(self.engine, request, adapter):
            job.add(plan, adapter)
        self._start(job, fate)

    def _pooled(self, kind: type[Any], make: Callable[..., PoolingJob]) -> Handler:
        def handle(exchange: Exchange) -> None:
            fate = self._admit(exchange)
            if fate is None:
                return
            request = read(exchange.request.body, kind)
            adapter = self._adapter(exchange, request.model)
            if adapter is not None:
                self._start(make(self.engine, exchange, fate, request, adapter), fate)

        return handle

    def _admit(self, exchange: Exchange) -> Fate | None:
        """Counts a request for inference; ``None`` when it has been answered already."""
        if self.draining:
            status = self.engine.faults.drain_status
            body = error("the engine is draining", "ServiceUnavailableError", status)
            exchange.send(status, body, headers="retry-after: 1\r\n")
            return None
        fate = self.engine.arrive()
        if fate.error_status is not None:
            self.engine.metrics.finished["error"] += 1
            exchange.send(
                fate.error_status, error("injected fault", "InternalServerError", fate.error_status)
            )
            return None
        return fate

    def _start(self, job: Job | PoolingJob, fate: Fate) -> None:
        if fate.delay:
            asyncio.get_running_loop().call_later(fate.delay, job.start)
        else:
            job.start()

    def _adapter(self, exchange: Exchange, model: str) -> str | None:
        """The adapter of a model name, empty for the model itself; ``None`` after a 404."""
        if model in self.config.names:
            return ""
        if model in self.adapters:
            return model
        exchange.send(404, error(f"The model `{model}` does not exist.", "NotFoundError", 404, "model"))
        return None

    # --- what engines tell ---

    def _health(self, exchange: Exchange) -> None:
        faults = self.engine.faults
        if not faults.health_hangs:
            exchange.send(faults.health_status)

    def _models(self, exchange: Exchange) -> None:
        common = {"object": "model", "created": self._started, "owned_by": SERVER}
        limit = self.config.max_model_len
        models: list[dict[str, Any]] = [
            {"id": name, **common, "root": self.config.model, "parent": None, "max_model_len": limit}
            for name in self.config.names
        ]
        models += [
            {"id": name, **common, "root": path, "parent": self.config.model, "max_model_len": None}
            for name, path in self.adapters.items()
        ]
        exchange.send(200, {"object": "list", "data": models})

    def _version(self, exchange: Exchange) -> None:
        exchange.send(200, {"version": f"{SERVER}/{importlib.metadata.version('modelfleet')}"})

    def _load(self, exchange: Exchange) -> None:
        scheduler = self.engine.scheduler
        exchange.send(200, {"server_load": len(scheduler.running) + len(scheduler.waiting)})

    def _metrics(self, exchange: Exchange) -> None:
        exposition = self.engine.metrics.exposition()
        exchange.send(200, exposition, content_type="text/plain; version=0.0.4; charset=utf-8")

    def _tokenize(self, exchange: Exchange) -> None:
        request = read(exchange.request.body, TokenizeRequest)
        if request.messages is not None:
            chat = ChatRequest(model=request.model or "", messages=request.messages, tools=request.tools)
            tokens = chat_tokens(chat)[0]
        elif request.prompt is not None:
            tokens = encode(request.prompt)
        else:
            raise BadRequestError("either prompt or messages must be given", "prompt")
        exchange.send(
            200, {"count": len(tokens), "max_model_len": self.config.max_model_len, "tokens": tokens}
        )

    def _detokenize(self, exchange: Exchange) -> None:
        exchange.send(200, {"prompt": decode(read(exchange.request.body, DetokenizeRequest).tokens)})

    # --- what engines are told ---

    def _load_adapter(self, exchange: Exchange) -> None:
        request = read(exchange.request.body, AdapterRequest)
        name = request.lora_name
        if not self.config.enable_lora:
            raise BadRequestError("LoRA is not enabled")
        if not name or not request.lora_path:
            raise BadRequestError("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.config.names or (name in self.adapters and not request.load_inplace):
            raise BadRequestError(f"The lora adapter '{name}' has already been loaded.")
        self.adapters[name] = request.lora_path
        text = f"Success: LoRA adapter '{name}' added successfully."
        exchange.send(200, text.encode(), content_type="text/plain; charset=utf-8")

    def _unload_adapter(self, exchange: Exchange) -> None:
        name = read(exchange.request.body, AdapterRequest).lora_name
        if self.adapters.pop(name, None) is None:
            exchange.send(404, error(f"The lora adapter '{name}' cannot be found.", "NotFoundError", 404))
            return
        text = f"Success: LoRA adapter '{name}' removed successfully."
        exchange.send(200, text.encode(), content_type="text/plain; charset=utf-8")

    def _sleep(self, exchange: Exchange) -> None:
        level = exchange.request.query.get("level", "1")
        if level not in {"1", "2"}:
            raise BadRequestError("level is 1 or 2", "level")
        self.engine.sleep(int(level))
        exchange.send(200)

    def _wake_up(self, exchange: Exchange) -> None:
        self.engine.wake_up()
        exchange.send(200)

    def _is_sleeping(self, exchange: Exchange) -> None:
        exchange.send(200, {"is_sleeping": self.engine.sleep_state != "awake"})

    def _reset_prefix_cache(self, exchange: Exchange) -> None:
        exchange.send(200, {"success": self.engine.scheduler.pool.reset()})

    def _faults(self, exchange: Exchange) -> None:
        exchange.send(200, self.engine.faults)

    def _set_faults(self, exchange: Exchange) -> None:
        try:
            changes = msgspec.json.decode(exchange.request.body, type=dict[str, Any])
            self.engine.set_faults(changed(self.engine.faults, changes))
        except (msgspec.DecodeError, ValueError) as problem:
            raise BadRequestError(str(problem)) from problem
        self._faults(exchange)

    def _clear_faults(self, exchange: Exchange) -> None:
        self.engine.set_faults(Faults())
        self._faults(exchange)


def _port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])
