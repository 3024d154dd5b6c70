"""LoRA adapters of an engine that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from tests.unit.registry.build import until

from modelfleet_serving import engines
from modelfleet_serving.contract import Adapter
from modelfleet_serving.supervisor import adapters as module
from modelfleet_serving.supervisor.adapters import Adapters
from modelfleet_serving.supervisor.probes import EngineClient

VLLM = engines.get("vLLM")


class Engine:
    """Answers as vLLM does."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.refused: set[str] = set()
        self.calls: list[str] = []
        self.stuck = asyncio.Event()
        self.stuck.set()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        return app

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        self.calls.append(f"load {name}")
        if name in self.loaded or name in self.refused:
            return web.Response(status=400, text=f"no {name}")
        self.loaded[name] = body["lora_path"]
        await self.stuck.wait()
        return web.Response(text="ok")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        return web.Response(status=200 if self.loaded.pop(name, None) else 404)


class Bench:
    def __init__(self, folder: Path, engine: Engine, client: EngineClient) -> None:
        self.folder = folder
        self.engine = engine
        self.client = client
        self.changes = 0
        self.adapters = Adapters(VLLM, {}, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def source(self, name: str) -> str:
        self.folder.joinpath(name).mkdir(exist_ok=True)
        return f"file://{self.folder}/{name}"

    def want(self, **sources: str) -> None:
        self.adapters.want([Adapter(name=name, source=source) for name, source in sources.items()])

    async def update(self) -> None:
        await self.adapters.update(self.client)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    engine = Engine()
    runner = web.AppRunner(engine.application(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        yield Bench(tmp_path, engine, EngineClient(session, f"http://127.0.0.1:{port}", VLLM))
    engine.stuck.set()
    await runner.cleanup()


async def test_they_come_and_go(bench: Bench) -> None:
    bench.want(x=bench.source("x"), y=bench.source("y"))
    await bench.update()
    assert bench.engine.loaded == {"x": f"{bench.folder}/x", "y": f"{bench.folder}/y"}
    assert bench.adapters.loaded.keys() == {"x", "y"}
    bench.want(y=bench.source("y"), z=bench.source("z"))
    await bench.update()
    assert bench.engine.loaded.keys() == {"y", "z"}
    assert bench.engine.calls == ["load x", "load y", "unload x", "load z"], "y was left alone"


async def test_another_source_under_the_same_name(bench: Bench) -> None:
    bench.want(x=bench.source("old"))
    await bench.update()
    bench.want(x=bench.source("new"))
    await bench.update()
    assert bench.engine.loaded == {"x": f"{bench.folder}/new"}
    assert bench.engine.calls == ["load x", "unload x", "load x"]


async def test_one_that_fails_keeps_none_of_the_others_away(bench: Bench) -> None:
    bench.engine.refused = {"bad"}
    bench.want(bad=bench.source("bad"), missing="file:///nowhere/at/all", good=bench.source("good"))
    await bench.update()
    assert bench.adapters.loaded.keys() == {"good"}
    assert "answered 400: no bad" in bench.adapters.problems["bad"]
    assert "there is no /nowhere/at/all" in bench.adapters.problems["missing"]
    bench.engine.refused = set()
    bench.want(bad=bench.source("bad"), good=bench.source("good"))
    await bench.update()
    assert bench.adapters.loaded.keys() == {"good", "bad"}
    assert bench.adapters.problems == {}


async def test_a_load_whose_answer_never_came_is_begun_anew(bench: Bench) -> None:
    bench.engine.stuck.clear()
    bench.want(x=bench.source("x"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await bench.update()
    assert bench.engine.loaded.keys() == {"x"}
    assert not bench.adapters.loaded
    bench.engine.stuck.set()
    await bench.update()
    assert bench.adapters.loaded.keys() == {"x"}
    assert bench.engine.calls == ["load x", "unload x", "load x"]


async def test_what_failed_is_tried_again_and_news_are_heard_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    bench.engine.refused = {"x"}
    bench.want(x=bench.source("x"))
    keeping = asyncio.create_task(bench.adapters.keep(bench.client))
    await until(lambda: bench.engine.calls.count("load x") > 2)
    bench.engine.refused = set()
    await until(lambda: "x" in bench.adapters.loaded)
    calls, changes = len(bench.engine.calls), bench.changes
    bench.want(x=bench.source("x"), y=bench.source("y"))
    await until(lambda: "y" in bench.adapters.loaded)
    assert bench.engine.calls[calls:] == ["load y"]
    assert bench.changes > changes, "the registry is told"
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
