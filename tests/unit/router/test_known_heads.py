"""Requests whose head came before on their connection must fare as on a connection of their own."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.router.harness import Engine, Harness, Received, answer_json, harness, model, post, until

from modelfleet_serving.router.known_heads import HeadPattern, pattern_of
from modelfleet_serving.router.tenants import hash_key

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nx-a: b\r\n\r\n"


def test_only_the_number_may_differ() -> None:
    pattern = pattern_of(HEAD)
    assert pattern is not None
    assert pattern.match(HEAD + b"body")
    assert (pattern.length, pattern.end) == (12, len(HEAD))
    assert pattern.match(HEAD.replace(b"12", b"123456"))
    assert (pattern.length, pattern.end) == (123_456, len(HEAD) + 4)


@pytest.mark.parametrize(
    "number", [b"", b"-1", b"+1", b"1 ", b" 1", b"0x1", b"1_0", b"1,1", b"\xb2", b"9" * 16]
)
def test_a_number_of_another_form_is_not_recognised(number: bytes) -> None:
    pattern = pattern_of(HEAD)
    assert pattern is not None
    assert not pattern.match(HEAD.replace(b"12", number))


@pytest.mark.parametrize("place", range(len(HEAD)))
def test_any_other_byte_and_any_shorter_head_is_not_recognised(place: int) -> None:
    pattern = pattern_of(HEAD)
    assert pattern is not None
    assert not pattern.match(HEAD[:place])
    if HEAD[place : place + 1] not in b"12":
        assert not pattern.match(HEAD[:place] + bytes([HEAD[place] ^ 1]) + HEAD[place + 1 :])


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"Content-Length: 12\r\n", b""),
        HEAD.replace(b"x-a: b", b"content-length: 12"),
        HEAD.replace(b"12", b"12 "),
        HEAD.replace(b"x-a: b", b"x-a: " + b"b" * 5000),
    ],
)
def test_a_head_of_a_rare_form_is_not_kept(head: bytes) -> None:
    pattern: HeadPattern | None = pattern_of(head)
    assert pattern is None


async def _setup(router: Harness, handler: Callable[..., Awaitable[None]] = answer_json) -> Engine:
    engine = await router.engine("r1", handler)
    await router.table(model(bf16=[engine]))
    return engine


async def _echo(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    text = json.dumps(
        {"got": request.json()["messages"][0]["content"], "as": sorted(request.headers)}
    ).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(text) + text)


def _request(size: int, **headers: str) -> bytes:
    return post(body={"messages": [{"role": "user", "content": "x" * size}], "model": "m"}, headers=headers)


async def test_each_of_many_sizes_comes_whole_and_is_answered_whole() -> None:
    async with harness() as router:
        engine = await _setup(router, _echo)
        client = await router.client()
        rng = random.Random(1)
        for size in [0, 1, 9, 10, 99, 100, 70_000, 300_000, 3, *(rng.randrange(2000) for _ in range(20))]:
            data = _request(size, **{"x-client": "a"})
            # In any pieces: inside the head, at its end, inside the body.
            cuts = sorted(rng.sample(range(1, len(data)), rng.randrange(3)))
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                client.send(data[start:end])
                await client.writer.drain()
                await asyncio.sleep(0.001)
            answer = await client.answer()
            assert answer.status == 200
            assert answer.json()["got"] == "x" * size
        assert all(request.headers["x-client"] == "a" for request in engine.requests)
        assert len({request.headers["x-request-id"] for request in engine.requests}) == len(engine.requests)


async def test_pipelined_requests_behind_a_known_head() -> None:
    async with harness() as router:
        await _setup(router, _echo)
        client = await router.client()
        client.send(_request(5))
        assert (await client.answer()).json()["got"] == "x" * 5
        client.send(_request(6) + _request(7) + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" + _request(8))
        assert (await client.answer()).json()["got"] == "x" * 6
        assert (await client.answer()).json()["got"] == "x" * 7
        assert (await client.answer()).status == 200
        assert (await client.answer()).json()["got"] == "x" * 8


async def test_a_head_is_never_taken_for_that_of_the_request_behind_it() -> None:
    async with harness() as router:
        await _setup(router, _echo)
        client = await router.client()
        other = _request(9, **{"x-client": "b"})
        client.send(_request(5, **{"x-client": "a"}) + other[:-20])
        assert (await client.answer()).status == 200
        client.send(other[-20:])
        assert (await client.answer()).status == 200
        for name in ("a", "b", "a"):
            client.send(_request(7, **{"x-client": name}))
            assert (await client.answer()).json()["got"] == "x" * 7
        assert [request.headers["x-client"] for request in router.engines[0].requests] == list("ababa")


async def test_a_key_that_is_taken_away_ends_with_its_next_request(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"

    def write(*names: str) -> None:
        entries: list[dict[str, Any]] = [{"name": name, "hash": hash_key(name)} for name in names]
        keys.write_text(yaml.safe_dump({"keys": entries}))

    write("a", "b")
    async with harness(tenants=str(keys)) as router:
        await _setup(router)
        client = await router.client()
        for size in (3, 4, 5):
            client.send(_request(size, authorization="Bearer a"))
            assert (await client.answer()).status == 200
        write("b")
        await until(lambda: router.worker.tenancy.generation)
        client.send(_request(6, authorization="Bearer a"))
        assert (await client.answer()).status == 401
        client.send(_request(6, authorization="Bearer b"))
        assert (await client.answer()).status == 200


async def test_limits_hold_for_known_heads() -> None:
    async with harness(max_body_bytes=10_000, max_buffered_bytes=100_000) as router:
        await _setup(router)
        client = await router.client()
        for _ in range(3):
            client.send(_request(5000))
            assert (await client.answer()).status == 200
        client.send(_request(20_000))
        assert (await client.answer()).status == 413
        assert router.worker.buffered == 0
        slow = await router.client()
        slow.send(_request(100))
        assert (await slow.answer()).status == 200
        slow.send(_request(100)[:-50])
        await until(lambda: router.worker.buffered)
        await slow.close()
        await until(lambda: not router.worker.buffered)


async def test_a_slow_body_behind_a_known_head_times_out() -> None:
    async with harness(body_timeout=0.2) as router:
        await _setup(router)
        client = await router.client()
        client.send(_request(100))
        assert (await client.answer()).status == 200
        client.send(_request(100)[:-50])
        assert (await client.answer()).status == 408


async def test_an_engine_that_changes_its_head_is_followed() -> None:
    heads = iter([b"", b"", b"x-a: 1\r\n", b"", b"connection: close\r\n", b""])

    async def changes(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        body = b'{"n": "%b"}' % (b"x" * len(engine.requests))
        extra = next(heads)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
        writer.write(head % (extra, len(body)) + body)
        if extra.startswith(b"connection"):
            writer.close()

    async with harness() as router:
        await _setup(router, changes)
        client = await router.client()
        seen = []
        for number in range(1, 7):
            client.send(post())
            answer = await client.answer()
            assert answer.json() == {"n": "x" * number}
            seen.append(answer.headers.get("x-a"))
        assert seen == [None, None, "1", None, None, None]
