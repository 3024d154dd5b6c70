"""The simulator's HTTP server, byte by byte, and its command line."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.simulator.conftest import TIMEOUT, Start

from modelfleet_serving.simulator import cli
from modelfleet_serving.simulator.config import profiles
from modelfleet_serving.simulator.server import Simulator


async def talk(simulator: Simulator, *pieces: bytes, until: bytes) -> bytes:
    """Sends pieces one after the other and reads until something comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        return await asyncio.wait_for(reader.readuntil(until), TIMEOUT)
    finally:
        writer.close()


def post(path: str, body: bytes, *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def test_requests_on_one_connection_are_answered_in_order(start: Start) -> None:
    simulator = await start()
    slow = post("/v1/completions", b'{"model":"m","prompt":"x","max_tokens":9}')
    fast = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await talk(
        simulator, slow + fast + fast, until=b'"version":"modelfleet-simulator/0.1.0"}HTTP/1.1'
    )
    assert answer.index(b"text_completion") < answer.index(b"version")


async def test_a_body_may_come_in_any_pieces(start: Start) -> None:
    simulator = await start()
    request = post("/tokenize", b'{"prompt":"abcd"}')
    answer = await talk(simulator, *(request[i : i + 7] for i in range(0, len(request), 7)), until=b"}")
    assert b'"count":1' in answer
    chunked = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b'9\r\n{"prompt"\r\n8\r\n:"abcd"}\r\n0\r\n\r\n'
    assert b'"count":1' in await talk(simulator, chunked, until=b"}")


async def test_the_head_s_rules(start: Start) -> None:
    simulator = await start()
    answer = await talk(simulator, post("/tokenize", b"", "Expect: 100-continue"), until=b"\r\n\r\n")
    assert answer == b"HTTP/1.1 100 Continue\r\n\r\n"
    request = post("/tokenize", b'{"prompt":"abcd"}', "X-Request-Id: abc", "Connection: close")
    answer = await talk(simulator, request, until=b"}")
    assert b"x-request-id: abc\r\n" in answer
    assert b"connection: close\r\n" in answer
    assert b"server: modelfleet-simulator\r\n" in answer
    answer = await talk(
        simulator, b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", until=b"\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_wrong_requests_get_their_status(start: Start) -> None:
    simulator = await start()
    assert b"404 Not Found" in await talk(simulator, post("/nowhere", b""), until=b"}")
    answer = await talk(simulator, b"GET /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", until=b"}")
    assert b"405 Method Not Allowed" in answer
    assert b"allow: POST" in answer
    assert b"400 Bad Request" in await talk(simulator, post("/v1/completions", b"{nonsense"), until=b"}")
    assert b"400 Bad Request" in await talk(simulator, b"not http at all\r\n\r\n", until=b"\r\n\r\n")


async def test_an_offered_upgrade_is_ignored(start: Start) -> None:
    simulator = await start()
    request = post("/tokenize", b'{"prompt":"abcd"}', "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    assert b'"count":1' in await talk(simulator, request, until=b"}")


async def test_a_body_too_large_is_413(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfleet_serving.simulator.http.MAX_BODY", 100)
    simulator = await start()
    answer = await talk(simulator, post("/tokenize", b" " * 101), until=b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("name", sorted(profiles()))
def test_every_profile_starts(name: str) -> None:
    config = cli.parse(["--model", "m", "--profile", name])
    assert config.kv_cache_tokens >= config.max_model_len
    assert config.speed.decode_base > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-model-len", "999999"], "more than the KV cache holds (131072 tokens)"),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "at least --max-num-seqs (8)"),
        (
            ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"],
            "at least --max-model-len (32768)",
        ),
        (["--port", "70000"], "argument --port: 70000: 0 to 65535"),
        (["--fault", "errorRate=2"], "$.errorRate"),
        (["--fault", "nothing=1"], "no such fault: nothing"),
        (["--lora-modules", "nonsense"], "NAME=PATH"),
        (["--max-seqs", "2"], "unrecognized arguments: --max-seqs 2"),
    ],
)
def test_a_wrong_option_is_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(["--model", "m", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_gpus_together_are_faster_and_hold_more() -> None:
    one = cli.parse(["--model", "m", "--profile", "a10-7b-awq"])
    two = cli.parse(["--model", "m", "--profile", "a10-7b-awq", "--tensor-parallel-size", "2"])
    assert two.speed.decode_base == pytest.approx(one.speed.decode_base / 1.85)
    assert two.kv_cache_tokens == pytest.approx(2 * one.kv_cache_tokens, rel=1e-3)
