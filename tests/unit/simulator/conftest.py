"""Simulators for the tests: in the test's own loop, or as a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from openai import AsyncOpenAI

from modelfleet_serving.simulator.cli import parse
from modelfleet_serving.simulator.server import Simulator

TIMEOUT = 20.0

Start = Callable[..., Awaitable[Simulator]]
Connect = Callable[[Simulator], AsyncOpenAI]


def url(simulator: Simulator) -> str:
    return f"http://127.0.0.1:{simulator.port}"


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts simulators in this loop; they end with the test."""
    tasks: list[asyncio.Task[None]] = []

    async def begin(*options: str) -> Simulator:
        simulator = Simulator(parse(["--model", "m", "--port", "0", *options]))
        ready = asyncio.Event()
        tasks.append(asyncio.create_task(simulator.serve(ready=ready.set)))
        await asyncio.wait_for(ready.wait(), TIMEOUT)
        return simulator

    yield begin
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes OpenAI clients, closed with the test."""
    async with contextlib.AsyncExitStack() as stack:
        made: list[AsyncOpenAI] = []

        def begin(simulator: Simulator) -> AsyncOpenAI:
            address = url(simulator) + "/v1"
            made.append(AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=TIMEOUT))
            stack.push_async_callback(made[-1].close)
            return made[-1]

        yield begin


@pytest.fixture
async def client(start: Start, connect: Connect) -> tuple[Simulator, AsyncOpenAI]:
    """A simulator with an adapter, and an OpenAI client for it."""
    simulator = await start("--lora-modules", "adapter=/adapters/a", "--decode-base-ms", "1")
    return simulator, connect(simulator)


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something in this loop has come true."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A simulator process and its URL; killed at the end if it still runs."""
    command = [sys.executable, "-m", "modelfleet_serving.simulator", "--model", "m", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            for line in child.stderr:
                if found := re.search(r"listening on (\S+)", line):
                    yield child, found[1]
                    return
            raise AssertionError("it ended before it listened")
        finally:
            child.kill()
