"""Streams through shortcuts: the same answers, counts and ends as without them.

The shortcuts are the C ones here, also where the rest of the data path is not compiled.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import pytest
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Harness,
    Received,
    answer_json,
    chunk,
    event,
    harness,
    model,
    post,
    until,
)

from modelfleet_serving.router import wire
from modelfleet_serving.router.event_loop import run

Test = Callable[[Harness], Awaitable[None]]
Served = Callable[..., None]
"""Runs a test; named arguments are the router's settings."""
TOKENS = 3000
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": TOKENS, "total_tokens": 7 + TOKENS},
}


def token(number: int) -> bytes:
    choice = {"index": 0, "delta": {"content": f"{number} "}, "finish_reason": None}
    return event(
        {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, compiled: ModuleType) -> Served:
    """Runs a test with a router whose sockets have shortcuts."""
    if wire.compiled is None:
        monkeypatch.setattr(wire, "compiled", compiled)
        monkeypatch.setattr(wire, "Shortcut", compiled.Shortcut)
        monkeypatch.setattr(wire, "Tape", compiled.Tape)

    def serve(test: Test, **settings: Any) -> None:
        async def main() -> None:
            async with harness(**settings) as router:
                await test(router)

        run(main())

    return serve


async def shortcut_of(router: Harness) -> Any:
    """The shortcut of the one stream that runs, once there is one."""

    def found() -> list[Any]:
        replies = [exchange.reply for exchange in router.worker.active]
        return [reply.shortcut for reply in replies if reply is not None and reply.shortcut is not None]

    await until(found)
    (shortcut,) = found()
    return shortcut


async def tokens(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    """A token each time that the router has taken the one before."""
    writer.write(SSE_HEAD)
    for number in range(TOKENS):
        writer.write(chunk(token(number)))
        await writer.drain()
        await asyncio.sleep(0)
    if (request.json().get("stream_options") or {}).get("include_usage"):
        writer.write(chunk(event(USAGE)))
    writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")


def test_a_stream_is_whole_and_counted(served: Served) -> None:
    async def test(router: Harness) -> None:
        await router.table(model(a=[await router.engine("r1", tokens)]))
        client = await router.client()
        passed = 0
        for _ in range(2):  # over the same two connections
            client.send(post(stream=True))
            shortcut = await shortcut_of(router)
            answer = await client.answer()
            assert answer.complete
            assert answer.body == b"".join(map(token, range(TOKENS))) + event("[DONE]")
            assert not shortcut.is_open
            passed += shortcut.pieces
        client.send(post(stream=True, stream_options={"include_usage": True}))
        assert (await client.answer()).body.count(b'"usage"') == 1
        stats = await router.stats()
        assert (stats.input_tokens, stats.output_tokens) == (7, TOKENS)
        assert stats.statuses == {200: 3}
        assert passed > TOKENS / 10  # engine, router and client share one event loop: tokens come in heaps
        assert passed < stats.gap.count <= 3 * TOKENS + 6
        assert 0 < stats.gap.sum < stats.duration.sum
        assert router.engines[0].connections == 1

    served(test)


def test_a_slow_client_gets_all_of_it_in_order(served: Served) -> None:
    total = 24 * 1024 * 1024
    piece = event({"text": "x" * 6000})

    async def flood(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(total // len(piece)):
            writer.write(chunk(event({"number": number}) + piece))
            await writer.drain()
            if number < 100:
                await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    async def test(router: Harness) -> None:
        await router.table(model(a=[await router.engine("r1", flood)]))
        client = await router.client()
        client.send(post(stream=True))
        shortcut = await shortcut_of(router)
        # The client reads nothing until the router has begun to wait for it.
        (connection,) = router.worker.clients
        await until(lambda: connection.full)
        assert not shortcut.is_open
        assert connection.transport.get_write_buffer_size() < 1024 * 1024
        answer = await client.answer()
        assert answer.complete
        expected = b"".join(event({"number": number}) + piece for number in range(total // len(piece)))
        assert answer.body == expected

    served(test)


@pytest.mark.parametrize("delivered", [5, 2000])
def test_another_engine_goes_on_from_what_took_the_shortcut(served: Served, delivered: int) -> None:
    async def dies(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(delivered):
            writer.write(chunk(token(number)))
            await writer.drain()
            await asyncio.sleep(0.002 if delivered < 100 else 0)
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def goes_on(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(delivered, delivered + 5):
            writer.write(chunk(token(number)))
        writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")

    async def test(router: Harness) -> None:
        engines = [await router.engine(name, dies) for name in ("one", "two")]

        async def first(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            for other in engines:
                other.handler = goes_on
            await dies(engine, request, writer)

        for engine in engines:
            engine.handler = first
        await router.table(model(a=engines))
        client = await router.client()
        client.send(post(stream=True))
        shortcut = await shortcut_of(router)
        answer = await client.answer()
        assert answer.complete
        assert shortcut.pieces > 0
        assert not shortcut.is_open
        lines = [line for line in answer.body.split(b"\n\n") if line.startswith(b"data: {")]
        text = "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines)
        assert text == "".join(f"{number} " for number in range(delivered + 5))
        (sent,) = [
            request
            for engine in engines
            for request in engine.requests[-1:]
            if b"continue_final" in request.body
        ]
        assert sent.json()["messages"][-1]["content"].split() == [str(number) for number in range(delivered)]

    served(test)


def test_a_client_that_leaves_ends_it(served: Served) -> None:
    async def slow(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(100_000):
            writer.write(chunk(token(number)))
            await writer.drain()
            await asyncio.sleep(0.002)

    async def test(router: Harness) -> None:
        engine = await router.engine("r1", slow)
        await router.table(model(a=[engine]))
        client = await router.client()
        client.send(post(stream=True))
        shortcut = await shortcut_of(router)
        await until(lambda: shortcut.pieces > 5)
        await client.close()
        await asyncio.wait_for(engine.closed.wait(), 5)
        assert not shortcut.is_open
        await until(lambda: not router.worker.active)
        assert (await router.stats()).statuses == {499: 1}

    served(test)


def test_a_silent_engine_is_noticed_from_its_last_chunk_on(served: Served) -> None:
    """What counts is when the shortcut has passed the last one on, not when the router's own code did."""

    async def falls_silent(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(40):
            writer.write(chunk(token(number)))
            await asyncio.sleep(0.02)
        await asyncio.Event().wait()

    async def test(router: Harness) -> None:
        await router.table(model(a=[await router.engine("r1", falls_silent)]))
        answer = await router.ask(stream=True, logprobs=True)  # not to be continued
        assert answer.body.count(b"chat.completion.chunk") == 40
        assert b"error" in answer.body

    served(test, idle_timeout=0.5)  # the first 40 tokens take 0.8 s


def test_a_pipelined_request_and_the_next_client_get_their_own_answers(served: Served) -> None:
    async def test(router: Harness) -> None:
        async def by_kind(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            await (tokens if request.json().get("stream") else answer_json)(engine, request, writer)

        await router.table(model(a=[await router.engine("r1", by_kind)]))
        client, other = await router.client(), await router.client()
        client.send(post(stream=True) + post() + post(stream=True))
        for kind in (True, False, True):
            answer = await client.answer()
            assert answer.complete
            assert (answer.body.count(b"chat.completion.chunk") == TOKENS) is kind
        other.send(post())
        assert (await other.answer()).json()["engine"] == "r1"
        assert router.engines[0].connections == 1

    served(test)


@pytest.mark.parametrize("last", [1, 200])
def test_an_engine_that_leaves_with_its_last_words_is_noticed(served: Served, last: int) -> None:
    """The end comes in the same moment as regular chunks, few or more than are read at once."""

    async def leaves(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(20):
            writer.write(chunk(token(number)))
            await asyncio.sleep(0.002)
        writer.write(b"".join(chunk(token(number)) for number in range(20, 20 + last)))
        writer.get_extra_info("socket").shutdown(socket.SHUT_WR)

    async def test(router: Harness) -> None:
        await router.table(model(a=[await router.engine("r1", leaves)]))
        client = await router.client()
        client.send(post(stream=True))
        async with asyncio.timeout(10):
            answer = await client.answer()
        assert b"".join(map(token, range(20 + last))) in answer.body
        assert b"error" in answer.body
        await until(lambda: not router.worker.active)

    served(test, continue_streams=False)


def test_nothing_of_a_heap_of_chunks_stays_behind(served: Served) -> None:
    """More than a read takes is there at once, and then nothing comes that would tell of the rest."""
    heap = b"".join(chunk(event({"text": "x" * 900})) for _ in range(1000))
    room = asyncio.Event()

    async def heaps(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for number in range(20):
            writer.write(chunk(token(number)))
            await asyncio.sleep(0.002)
        await room.wait()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        writer.write(heap + chunk(event("[DONE]")) + b"0\r\n\r\n")

    async def test(router: Harness) -> None:
        await router.table(model(a=[await router.engine("r1", heaps)]))
        client = await router.client()
        client.send(post(stream=True))
        shortcut = await shortcut_of(router)
        (exchange,) = router.worker.active
        upstream = exchange.upstream
        assert upstream is not None
        upstream.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        await until(lambda: shortcut.pieces > 5)
        room.set()
        async with asyncio.timeout(10):
            answer = await client.answer()
        assert answer.complete
        assert answer.body.count(b"x" * 900) == 1000

    served(test)
