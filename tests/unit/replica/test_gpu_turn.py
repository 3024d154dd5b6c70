"""Engines on shares of one GPU start one after the other."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from tests.unit.replica.script import ScriptEngine, arguments
from tests.unit.replica.test_supervisor import LIMITS, until

from modelfleet_serving import engines
from modelfleet_serving.contract import ReplicaResources
from modelfleet_serving.supervisor import gpu_turn
from modelfleet_serving.supervisor.gpu_turn import GpuTurn
from modelfleet_serving.supervisor.state import Phase
from modelfleet_serving.supervisor.supervisor import Supervisor

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_turn, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(engines, "REGISTRY", {"Script": ScriptEngine()})


def _supervisor(folder: Path, name: str, devices: str = "0", gpus: float = 0.3) -> Supervisor:
    resources = ReplicaResources(num_gpus=gpus)
    return Supervisor(
        args=msgspec.structs.replace(arguments(folder), resources=resources),
        replica=name,
        host="127.0.0.1",
        log=folder / f"{name}.log",
        limits=LIMITS,
        environ={**os.environ, "CUDA_VISIBLE_DEVICES": devices},
    )


async def test_the_second_starts_when_the_first_is_ready(tmp_path: Path) -> None:
    one, two = _supervisor(tmp_path, "one"), _supervisor(tmp_path, "two")
    elsewhere, whole = _supervisor(tmp_path, "three", devices="1"), _supervisor(tmp_path, "four", gpus=1)
    (tmp_path / "broken").touch()  # they run, and don't get ready
    running = [asyncio.create_task(one.run())]
    try:
        await until(lambda: one.state.phase is Phase.STARTING, "the first starts")
        running += [asyncio.create_task(each.run()) for each in (two, elsewhere, whole)]
        for other in (elsewhere, whole):
            await until(lambda other=other: other.state.phase is Phase.STARTING, "others wait for nobody")  # type: ignore[misc]
        await asyncio.sleep(0.2)
        assert two.state.phase is Phase.LAUNCHING
        (tmp_path / "broken").unlink()
        await until(lambda: two.state.phase is Phase.READY, "the second is ready as well")
        assert one.state.phase is Phase.READY
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    held = GpuTurn.of(0.5, {"CUDA_VISIBLE_DEVICES": "0"})
    assert await held.take(1, asyncio.Event())
    supervisor = _supervisor(tmp_path, "waits")
    running = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor.state.phase is Phase.LAUNCHING, "it waits")
    await asyncio.wait_for(supervisor.stop(), 10)
    await running
    held.give_back()
    assert not (tmp_path / "waits.log").exists()


async def test_the_turn_of_a_process_that_died_is_free() -> None:
    turn = GpuTurn.of(0.5, {"CUDA_VISIBLE_DEVICES": "GPU-1/2"})
    assert turn._path is not None
    turn._path.parent.mkdir(parents=True)
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(turn._path), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    taking = asyncio.create_task(turn.take(30, asyncio.Event()))
    await asyncio.sleep(0.1)
    assert not taking.done()
    holder.kill()
    await holder.wait()
    assert await taking
    turn.give_back()


async def test_nobody_waits_for_ever() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0"}
    held, other = GpuTurn.of(0.5, environ), GpuTurn.of(0.5, environ)
    assert await held.take(1, asyncio.Event())
    assert await other.take(0.05, asyncio.Event())
    other.give_back()
    third = asyncio.create_task(other.take(5, asyncio.Event()))
    await asyncio.sleep(0.1)
    assert not third.done(), "giving back what it did not hold freed it"
    held.give_back()
    assert await third
    other.give_back()


@pytest.mark.parametrize(("gpus", "devices"), [(1, "0"), (0, ""), (0.5, ""), (2, "0,1")])
async def test_who_shares_nothing_waits_for_nothing(gpus: float, devices: str) -> None:
    turn = GpuTurn.of(gpus, {"CUDA_VISIBLE_DEVICES": devices})
    assert turn._path is None
    assert await turn.take(1, asyncio.Event())
    turn.give_back()
