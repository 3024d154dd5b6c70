"""Faults, and how a simulator ends."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import aiohttp
import pytest
from tests.unit.simulator.conftest import TIMEOUT, Connect, Start, process, until, url

from modelfleet_serving.simulator.faults import Faults, changed, draw
from modelfleet_serving.simulator.server import Simulator

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


async def order(simulator: Simulator, faults: dict[str, Any]) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(url(simulator)) as session,
        session.post("/simulator/faults", json=faults) as response,
    ):
        return response.status, await response.json()


async def ask(simulator: Simulator, **changes: Any) -> int:
    async with (
        aiohttp.ClientSession(url(simulator), timeout=aiohttp.ClientTimeout(TIMEOUT)) as session,
        session.post("/v1/chat/completions", json=BODY | changes) as response,
    ):
        await response.read()
        return response.status


async def test_a_share_of_requests_fails_the_same_ones_each_time(start: Start) -> None:
    async def statuses() -> list[int]:
        simulator = await start("--fault", "errorRate=0.5", "--fault", "errorStatus=502", "--seed", "3")
        return [await ask(simulator) for _ in range(30)]

    first = await statuses()
    assert set(first) == {200, 502}
    assert 5 < first.count(502) < 25
    assert first == await statuses()


async def test_faults_are_ordered_and_taken_back_while_it_runs(start: Start) -> None:
    simulator = await start()
    assert await ask(simulator) == 200
    status, faults = await order(simulator, {"errorRate": 1})
    assert (status, faults["errorRate"]) == (200, 1)
    assert await ask(simulator) == 500
    async with (
        aiohttp.ClientSession(url(simulator)) as session,
        session.delete("/simulator/faults") as response,
    ):
        assert (await response.json())["errorRate"] == 0
    assert await ask(simulator) == 200
    status, answer = await order(simulator, {"errorRat": 1})
    assert status == 400
    assert "no such fault: errorRat; there are errorRate" in answer["error"]["message"]
    status, answer = await order(simulator, {"errorRate": 2})
    assert status == 400
    assert "$.errorRate" in answer["error"]["message"]


async def test_a_stall_in_the_prefill_lasts_until_the_client_goes(start: Start, connect: Connect) -> None:
    simulator = await start("--fault", "stallRate=1")
    api = connect(simulator)
    stream = await api.chat.completions.create(**BODY, stream=True)
    first = asyncio.ensure_future(anext(aiter(stream)))
    done, _ = await asyncio.wait((first,), timeout=0.1)
    assert not done
    assert len(simulator.engine.scheduler.running) == 1
    first.cancel()
    await stream.close()
    await until(lambda: not simulator.engine.scheduler.running)


async def read_pieces(simulator: Simulator, said: list[bytes]) -> None:
    """Collects the content events of a stream, as they come."""
    async with (
        aiohttp.ClientSession(url(simulator)) as session,
        session.post("/v1/chat/completions", json=BODY | {"stream": True}) as response,
    ):
        async for line in response.content:
            if b'"content":" ' in line:
                said.append(line)  # noqa: PERF401 - what came before a break counts


async def test_a_stall_in_the_middle(start: Start) -> None:
    simulator = await start("--fault", "stallRate=1", "--fault", "stallAfterTokens=2")
    said: list[bytes] = []
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read_pieces(simulator, said), 0.2)
    assert len(said) == 2


async def test_a_reset_before_the_answer_or_in_the_middle(start: Start) -> None:
    simulator = await start("--fault", "resetRate=1", "--fault", "resetAfterTokens=2")
    said: list[bytes] = []
    with pytest.raises(aiohttp.ClientError):
        await read_pieces(simulator, said)
    assert len(said) == 2
    await order(simulator, {"resetAfterTokens": 0})
    with pytest.raises(aiohttp.ClientError):
        await ask(simulator)


async def test_health_says_what_it_is_told_to(start: Start) -> None:
    simulator = await start()
    async with aiohttp.ClientSession(url(simulator), timeout=aiohttp.ClientTimeout(TIMEOUT)) as session:

        async def health(seconds: float = TIMEOUT) -> int:
            async with session.get("/health", timeout=aiohttp.ClientTimeout(seconds)) as response:
                return response.status

        assert await health() == 200
        await order(simulator, {"healthStatus": 503})
        assert await health() == 503
        assert await ask(simulator) == 200
        await order(simulator, {"healthHangs": True})
        with pytest.raises(TimeoutError):
            await health(0.1)


async def test_a_delay_and_a_slowdown(start: Start) -> None:
    simulator = await start("--decode-base-ms", "1", "--fault", "delaySeconds=0.1")
    began = time.monotonic()
    await ask(simulator)
    assert time.monotonic() - began >= 0.1
    await order(simulator, {"delaySeconds": 0, "slowdown": 40})
    began = time.monotonic()
    await ask(simulator)
    assert time.monotonic() - began >= 0.12  # three steps of 1 ms and a prefill of 1 ms, forty times as long


async def test_while_it_sleeps_requests_hang_and_health_is_well(start: Start) -> None:
    simulator = await start()
    async with aiohttp.ClientSession(url(simulator)) as session:
        async with session.post("/sleep?level=1") as response:
            assert response.status == 200
        async with session.get("/is_sleeping") as response:
            assert await response.json() == {"is_sleeping": True}
        asked = asyncio.create_task(ask(simulator))
        done, _ = await asyncio.wait((asked,), timeout=0.1)
        assert not done
        async with session.get("/health") as response:
            assert response.status == 200
        async with session.get("/metrics") as response:
            assert 'sleep_state="weights_offloaded"} 1.0' in await response.text()
        async with session.post("/wake_up") as response:
            assert response.status == 200
    assert await asyncio.wait_for(asked, TIMEOUT) == 200


def test_changing_one_fault_leaves_the_draws_of_the_others() -> None:
    def errors(faults: Faults) -> list[bool]:
        rng = random.Random(1)
        return [draw(faults, rng).error_status is not None for _ in range(50)]

    base = changed(Faults(), {"errorRate": 0.3})
    assert errors(base) == errors(changed(base, {"stallRate": 0.9, "resetRate": 0.5}))


# --- processes ---


def post(address: str, **changes: Any) -> int:
    data = json.dumps(BODY | changes).encode()
    try:
        with urllib.request.urlopen(address + "/v1/chat/completions", data, timeout=TIMEOUT) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_dies_after_so_many_requests_without_a_word() -> None:
    with process("--fault", "dieAfterRequests=2") as (child, address):
        assert [post(address), post(address)] == [200, 200]
        with pytest.raises(OSError, match=r"closed|reset"):
            post(address)
        assert child.wait(TIMEOUT) == 1


def test_it_dies_in_the_middle_of_its_streams() -> None:
    with process("--fault", "dieAfterTokens=10") as (child, address):
        with pytest.raises(OSError, match=r"closed|reset|read"):
            post(address, max_tokens=100)
        assert child.wait(TIMEOUT) == 1


def read_stream(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


def open_stream(address: str, tokens: int) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=TIMEOUT)
    body = json.dumps(BODY | {"stream": True, "max_tokens": tokens}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize(("option", "expected"), [(None, 503), ("drainStatus=500", 500)])
def test_on_sigterm_what_runs_ends_whole_and_what_comes_is_refused(option: str | None, expected: int) -> None:
    extra = ("--fault", option) if option else ()
    with process("--shutdown-timeout", "10", "--decode-base-ms", "10", *extra) as (child, address):
        with open_stream(address, 60) as stream, open_stream(address, 1) as other:
            first = stream.recv(65536)
            assert b"content" in first or b"200 OK" in first
            # The listening socket stays open while it drains: a new request gets an answer, not a refusal.
            child.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + TIMEOUT
            while (status := post(address)) == 200:
                assert time.monotonic() < deadline
            assert status == expected
            whole = first + read_stream(stream)
            other.close()
        assert whole.count(b'"content":" ') == 60
        assert whole.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert child.wait(TIMEOUT) == 0


def test_without_a_shutdown_timeout_running_requests_are_aborted() -> None:
    with process("--decode-base-ms", "50") as (child, address), open_stream(address, 1000) as stream:
        stream.recv(65536)
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT) == 0
        assert time.monotonic() - began < 5
        assert b"[DONE]" not in read_stream(stream)


def test_a_slow_start_doesn_t_listen_and_can_be_ended() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "modelfleet_serving.simulator", "--model", "m", "--port", str(port)]
    with subprocess.Popen([*command, "--start-delay", "60"], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "KV cache size" in line:
                break
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        # Handlers are in place a moment after the last line; until then SIGTERM ends it as well.
        child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT) in {0, -signal.SIGTERM}
