"""The supervisor with a real process tree and a real registry."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.unit.registry.build import route
from tests.unit.replica.script import ScriptEngine, alive, arguments, processes_with

from modelfleet_serving import engines
from modelfleet_serving.contract import EndpointState, Heartbeat
from modelfleet_serving.registry.server import RegistryServer
from modelfleet_serving.registry.state import Settings
from modelfleet_serving.supervisor.state import Limits
from modelfleet_serving.supervisor.supervisor import Supervisor

TOKEN = "secret-token-of-the-cluster"
LIMITS = Limits(
    start=5, drain=10, leave=3, end=3, backoff_first=0.1, backoff_most=0.3, hopeless=3, liveness_failures=2
)


async def until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def _script_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "REGISTRY", {"Script": ScriptEngine()})
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr("modelfleet_serving.supervisor.supervisor.LIVENESS_SECONDS", 0.2)
    monkeypatch.setattr("modelfleet_serving.supervisor.supervisor.KILL_GRACE_SECONDS", 0.3)


class Bench:
    """A registry and supervisors that report to it."""

    def __init__(self, folder: Path, server: RegistryServer) -> None:
        self.folder = folder
        self.server = server
        self.url = f"http://127.0.0.1:{server.port}"
        self._count = 0

    def seen(self) -> dict[str, Heartbeat]:
        return {beat.id: beat for beat in self.server.registry.endpoints}

    def beat(self, name: str) -> Heartbeat:
        return self.seen()[name]

    async def until_state(self, name: str, state: EndpointState) -> Heartbeat:
        await until(lambda: name in self.seen() and self.beat(name).state is state, f"{name} is {state}")
        return self.beat(name)

    @asynccontextmanager
    async def replica(self, limits: Limits = LIMITS, **engine_args: Any) -> AsyncIterator[Supervisor]:
        self._count += 1
        supervisor = Supervisor(
            args=arguments(self.folder, self.url, **engine_args),
            replica=f"replica{self._count}",
            host="127.0.0.1",
            log=self.folder / f"replica{self._count}.log",
            limits=limits,
        )
        task = asyncio.create_task(supervisor.run())
        try:
            yield supervisor
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: not processes_with(str(self.folder)), "nothing is left")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    server = RegistryServer(TOKEN, Settings(settle=0.0))
    async with server.running("127.0.0.1", 0):
        server.registry.put_route(route(), 0.0)
        await until(lambda: not server.registry.warming, "the registry has settled")
        yield Bench(tmp_path, server)


async def test_it_becomes_ready_and_reports_what_it_knows(bench: Bench) -> None:
    async with bench.replica() as supervisor:
        beat = await bench.until_state("replica1", EndpointState.READY)
        assert beat.url.startswith("http://127.0.0.1:")
        assert beat.capacity == 7
        assert beat.memory is not None
        assert beat.memory.weights_gib == 1.5
        await until(lambda: bench.beat("replica1").load.kv_cache_usage == 0.25, "its load")
        await supervisor.stop()
    assert bench.seen() == {}, "it said goodbye"


async def test_a_drain_lets_the_running_request_end(bench: Bench) -> None:
    async with bench.replica() as supervisor, aiohttp.ClientSession() as session:
        beat = await bench.until_state("replica1", EndpointState.READY)
        answer = await session.get(beat.url + "/slow")
        assert await answer.content.readline() == b"first\n"
        stopping = asyncio.create_task(supervisor.stop())
        await bench.until_state("replica1", EndpointState.DRAINING)
        await asyncio.sleep(0.4)
        assert not stopping.done(), "a request is running"
        (bench.folder / "finish").touch()
        assert await answer.content.readline() == b"last\n"
        await asyncio.wait_for(stopping, 3)
    assert bench.seen() == {}


async def test_a_drain_waits_until_every_router_knows(bench: Bench) -> None:
    registry = bench.server.registry
    async with bench.replica() as supervisor:
        await bench.until_state("replica1", EndpointState.READY)
        registry.open_poll("router", registry.epoch, registry.table.version, 0.0)
        stopping = asyncio.create_task(supervisor.stop())
        await bench.until_state("replica1", EndpointState.DRAINING)
        await asyncio.sleep(0.4)
        assert processes_with(str(bench.folder)), "a router may still send requests"
        registry.open_poll("router", registry.epoch, registry.table.version, 0.0)
        await asyncio.wait_for(stopping, 3)


async def test_a_registry_that_is_away_holds_up_no_drain(bench: Bench) -> None:
    bench.url = "http://127.0.0.1:9"
    async with bench.replica(Limits(start=5, drain=5, leave=0.5, end=2)) as supervisor:
        await until(lambda: supervisor.state.endpoint is EndpointState.READY, "ready without a registry")
        await asyncio.wait_for(supervisor.stop(), 3)


async def test_a_killed_engine_comes_back_and_the_log_is_reported(bench: Bench) -> None:
    seen: list[Heartbeat] = []
    async with bench.replica() as supervisor:
        first = await bench.until_state("replica1", EndpointState.READY)
        assert supervisor._process is not None
        os.kill(supervisor._process.pid, signal.SIGKILL)

        def back() -> bool:
            seen.append(bench.beat("replica1"))
            return seen[-1].restarts == 1 and seen[-1].state is EndpointState.READY

        await until(back, "it is back")
        failed = next(b for b in seen if b.state is EndpointState.FAILED)
        assert failed.reason == "EngineKilled"
        assert "killed by SIGKILL" in failed.message
        assert "loaded 1.5 GiB" in failed.message
        assert seen[-1].url != first.url
        assert (seen[-1].reason, seen[-1].message) == ("", "")


@pytest.mark.parametrize(
    ("mode", "reason", "line"),
    [
        ("fail", "EngineExited", "ValueError: the weights are not what they seem"),
        ("oom", "OutOfMemory", "CUDA out of memory"),
    ],
)
async def test_an_engine_that_fails_again_and_again(bench: Bench, mode: str, reason: str, line: str) -> None:
    async with bench.replica(mode=mode) as supervisor:
        beat = await bench.until_state("replica1", EndpointState.FAILED)
        assert beat.reason == reason
        assert line in beat.message
        assert "hf_abcdef123456" not in beat.message
        assert "token is ***" in beat.message
        await until(lambda: supervisor.hopeless, "Serve may place it elsewhere")
        assert TOKEN not in (bench.folder / "replica1.log").read_text()
        await asyncio.wait_for(supervisor.stop(), 3)


async def test_an_engine_that_never_listens_is_restarted(bench: Bench) -> None:
    async with bench.replica(Limits(start=0.5, drain=1, backoff_first=0.1), mode="silent") as supervisor:
        beat = await bench.until_state("replica1", EndpointState.FAILED)
        assert beat.reason == "StartTimeout"
        assert "not ready 0.5 s after its start" in beat.message
        assert "startup complete" in beat.message
        await until(lambda: supervisor.state.restarts >= 1, "it is started again")


async def test_an_engine_that_is_broken_is_restarted(bench: Bench) -> None:
    async with bench.replica():
        await bench.until_state("replica1", EndpointState.READY)
        (bench.folder / "broken").touch()
        beat = await bench.until_state("replica1", EndpointState.FAILED)
        assert beat.reason == "Unresponsive"
        assert "answered 503" in beat.message
        (bench.folder / "broken").unlink()
        beat = await bench.until_state("replica1", EndpointState.READY)
        assert beat.restarts >= 1


async def test_a_stubborn_tree_is_killed_whole(bench: Bench) -> None:
    async with bench.replica(Limits(start=5, drain=0.2, leave=0.2, end=0.3), mode="stubborn") as supervisor:
        await bench.until_state("replica1", EndpointState.READY)
        assert len(processes_with(str(bench.folder))) >= 4, "guard, engine and its workers"
        await asyncio.wait_for(supervisor.stop(), 8)
        await until(lambda: not processes_with(str(bench.folder)), "its guard has ended as well", 0.5)


async def test_weights_that_are_not_there(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    supervisor = Supervisor(
        args=arguments(folder, bench.url),
        replica="x",
        host="127.0.0.1",
        log=tmp_path / "x.log",
        limits=LIMITS,
    )
    folder.rmdir()
    task = asyncio.create_task(supervisor.run())
    beat = await bench.until_state("x", EndpointState.FAILED)
    assert beat.reason == "ModelNotFound"
    assert str(folder) in beat.message
    await supervisor.stop()
    await task


async def test_heartbeats_that_fail_by_a_bug_are_no_secret(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.replica() as supervisor:
        await bench.until_state("replica1", EndpointState.READY)

        def broken(sequence: int) -> Heartbeat:
            raise KeyError(sequence)

        monkeypatch.setattr(supervisor._sender, "_compose", broken)
        await until(lambda: "KeyError" in supervisor.fault, "Serve's health check can tell")


async def test_a_replica_whose_connection_breaks_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = bench.server.registry
    registry.settings = Settings(settle=0.0, reconnect=1.0)
    monkeypatch.setattr(
        "modelfleet_serving.supervisor.heartbeat._PRESENCE", aiohttp.ClientTimeout(total=0.05)
    )
    monkeypatch.setattr("modelfleet_serving.supervisor.heartbeat._BACKOFF_MOST", 0.05)
    ended: list[str] = []
    disconnected = registry.disconnected

    def record(replica: str, now: float) -> None:
        ended.append(replica)
        disconnected(replica, now)

    monkeypatch.setattr(registry, "disconnected", record)
    async with bench.replica():
        await bench.until_state("replica1", EndpointState.READY)
        ended.clear()
        await until(lambda: len(ended) > 30, "its connection broke again and again")
        assert bench.beat("replica1").state is EndpointState.READY
        assert [incidents.lost for _, incidents in registry.endpoints.incidents] == [0]


async def test_the_engine_and_the_endpoint_end_with_their_owner(bench: Bench, tmp_path: Path) -> None:
    """The owner is killed by SIGKILL: it can do nothing about it any more."""
    code = f"""
import asyncio, pathlib, sys
from modelfleet_serving import engines
from modelfleet_serving.supervisor.supervisor import Supervisor
from tests.unit.replica.script import ScriptEngine, arguments
engines.REGISTRY = {{"Script": ScriptEngine()}}
folder = pathlib.Path({str(tmp_path)!r})
async def main():
    args = arguments(folder, {bench.url!r}, mode="stubborn")
    s = Supervisor(args=args, replica="x", host="127.0.0.1", log=folder / "x.log")
    asyncio.create_task(s.run())
    while s.state.endpoint != "Ready":
        await asyncio.sleep(0.02)
    print("ready", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"ready\n"
    tree = [pid for pid in processes_with(str(tmp_path)) if pid != owner.pid]
    assert len(tree) >= 4
    await bench.until_state("x", EndpointState.READY)
    owner.kill()
    await owner.wait()
    await until(lambda: not any(alive(pid) for pid in tree), "the engine is gone", seconds=2.0)
    assert bench.server.registry.lease == 10
    await until(lambda: "x" not in bench.seen(), "the endpoint is gone before its lease ends", seconds=5.0)
    assert [incidents.lost for _, incidents in bench.server.registry.endpoints.incidents] == [1]
    assert not processes_with(str(tmp_path))
