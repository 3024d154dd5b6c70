"""A stream whose replica dies goes on at another replica, and the client sees one stream."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Handler,
    Harness,
    Received,
    answer_status,
    chunk,
    event,
    harness,
    model,
    post,
)


def _delta(text: str | None, *, finish: str | None = None, **rest: Any) -> dict[str, Any]:
    delta = {"content": text} if text is not None else {}
    return {
        "id": rest.pop("id", "chatcmpl-1"),
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {**delta, **rest}, "finish_reason": finish}],
    }


def speaks_then_dies(*texts: str) -> Handler:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + chunk(event(_delta("", role="assistant"))))
        for text in texts:
            writer.write(chunk(event(_delta(text))))
        half = chunk(event(_delta("never whole")))
        writer.write(half[: len(half) // 2])
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    return handler


async def goes_on(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    body = request.json()
    writer.write(SSE_HEAD)
    for entry in (
        _delta("", role="assistant", id="x"),
        _delta(" three", id="x"),
        _delta(None, finish="stop", id="x"),
    ):
        writer.write(chunk(event(entry)))
    usage = {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13}
    if (body.get("stream_options") or {}).get("include_usage"):
        writer.write(
            chunk(event({"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        )
    writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")


def _chunks(body: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def _pair(router: Harness, first: Handler, second: Handler) -> tuple[Engine, Engine]:
    """The first of two engines gets the request: the other one is at its limit until then."""
    one, two = await router.engine("one", first), await router.engine("two", second)
    table = model(a=[one, two])
    table["variants"][0]["endpoints"][1]["capacity"] = 0
    await router.table(table)
    two_ref = router.worker.table.models["m"].variants["a"].endpoints[1]
    two_ref.capacity = None

    async def opens(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        two_ref.limit = 100
        two_ref.variant.pool.refresh()
        await first(engine, request, writer)

    one.handler = opens
    return one, two


async def test_a_chat_goes_on_where_it_stopped(router: Harness) -> None:
    _, two = await _pair(router, speaks_then_dies("one", " two"), goes_on)
    options = {"include_usage": True}
    answer = await router.ask(stream=True, max_tokens=10, stream_options=options)
    assert answer.complete
    chunks = _chunks(answer.body)
    assert (
        "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        == "one two three"
    )
    assert {c["id"] for c in chunks} == {"chatcmpl-1"}
    assert sum("role" in c["choices"][0]["delta"] for c in chunks if c["choices"]) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert b": modelfleet continued from=one to=two\n\n" in answer.body
    sent = two.requests[0].json()
    assert sent["messages"][-1] == {"role": "assistant", "content": "one two"}
    assert sent["continue_final_message"] is True
    assert sent["max_tokens"] == 8
    stats = await router.stats()
    assert (stats.continued, stats.statuses) == (1, {200: 1})
    assert sum(router.hub.counters.cells) == 0


@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}]
)
async def test_what_is_not_safe_ends_with_an_error(router: Harness, fields: dict[str, Any]) -> None:
    await _pair(router, speaks_then_dies("one"), goes_on)
    answer = await router.ask(stream=True, **fields)
    assert not answer.complete
    assert b"can't be continued" in answer.body
    assert b"three" not in answer.body


async def test_nobody_left_to_go_on(router: Harness) -> None:
    await router.table(model(a=[await router.engine("one", speaks_then_dies("one"))]))
    answer = await router.ask(stream=True)
    assert not answer.complete
    assert b'"error"' in answer.body
    assert sum(router.hub.counters.cells) == 0


async def test_the_second_replica_fails_as_well(router: Harness) -> None:
    await _pair(router, speaks_then_dies("one"), answer_status(500))
    answer = await router.ask(stream=True)
    assert not answer.complete
    assert b'"error"' in answer.body
    assert sum(router.hub.counters.cells) == 0


async def test_it_can_be_switched_off() -> None:
    async with harness(continue_streams=False) as router:
        _, two = await _pair(router, speaks_then_dies("one"), goes_on)
        answer = await router.ask(stream=True)
        assert not answer.complete
        assert not two.requests


async def test_two_deaths_in_a_row(router: Harness) -> None:
    third_is_there = asyncio.Event()

    async def dies_going_on(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + chunk(event(_delta(" two", id="y"))))
        await writer.drain()
        await third_is_there.wait()
        writer.transport.abort()

    one, two, three = [await router.engine(name) for name in ("one", "two", "three")]
    one.handler, two.handler, three.handler = speaks_then_dies("one"), dies_going_on, goes_on
    tables = []
    for ready in ([one], [one, two], [two, three]):
        table = model(a=[one, two, three])
        for endpoint in table["variants"][0]["endpoints"]:
            endpoint["state"] = "Ready" if endpoint["id"] in {e.name for e in ready} else "Starting"
        tables.append(table)
    await router.table(tables[0])
    client = await router.client()
    client.send(post(stream=True))
    await client.head()
    await router.table(tables[1])
    first = await client.reader.readuntil(b" two")
    await router.table(tables[2])
    third_is_there.set()
    rest, complete = b"", True
    while not rest.endswith(b"0\r\n\r\n"):
        data = await asyncio.wait_for(client.reader.read(65_536), 5)
        if not data:
            complete = False
            break
        rest += data
    assert complete
    assert b"one" in first
    assert three.requests[0].json()["messages"][-1]["content"] == "one two"
    assert b" three" in rest


def _choice(index: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
    entry = _delta(text, finish=finish)
    entry["choices"][0]["index"] = index
    return entry


@pytest.mark.parametrize(
    "sent",
    [
        [_choice(0, "one"), _choice(1, "uno"), _choice(0, None, "stop")],
        [_choice(0, "one"), _choice(0, None, "stop")],
        [_choice(1, None, "stop")],
    ],
)
async def test_one_finished_choice_of_two_is_not_the_end(router: Harness, sent: list[dict[str, Any]]) -> None:
    async def dies(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + b"".join(chunk(event(entry)) for entry in sent))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    await _pair(router, dies, goes_on)
    answer = await router.ask(stream=True, n=2)
    assert not answer.complete
    assert b'"error"' in answer.body
    assert b"[DONE]" not in answer.body


async def test_both_finished_choices_are_the_end(router: Harness) -> None:
    async def dies(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        for entry in (
            _choice(0, "one"),
            _choice(1, "uno"),
            _choice(1, None, "stop"),
            _choice(0, None, "stop"),
        ):
            writer.write(
                (SSE_HEAD if entry["choices"][0]["delta"] == {"content": "one"} else b"")
                + chunk(event(entry))
            )
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    await _pair(router, dies, goes_on)
    answer = await router.ask(stream=True, n=2)
    assert answer.complete
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_an_engine_that_will_not_go_on_is_not_blamed(router: Harness) -> None:
    """A model without ``continue_final_message`` answers 400: that says nothing about the engine's health."""
    _, two = await _pair(router, speaks_then_dies("one"), answer_status(400))
    answer = await router.ask(stream=True)
    assert not answer.complete
    assert b"answered 400" in answer.body
    ref = router.worker.table.models["m"].variants["a"].endpoints[1]
    assert len(two.requests) == 1
    assert not ref.circuit.failures


async def test_as_many_deaths_as_it_takes_while_text_comes(router: Harness) -> None:
    """Each engine says one word and dies; those that come back are used again."""
    words = iter(["one", " two", " three", " four", " five", " six"])

    async def says_a_word(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        word = next(words, None)
        if word is None:
            await goes_on(engine, request, writer)
            return
        writer.write(SSE_HEAD + chunk(event(_delta(word))))
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.transport.abort()

    engines = [await router.engine(name, says_a_word) for name in ("r1", "r2")]
    await router.table(model(a=engines))
    answer = await router.ask(stream=True)
    assert answer.complete
    text = "".join(
        c["choices"][0]["delta"].get("content") or "" for c in _chunks(answer.body) if c["choices"]
    )
    assert text == "one two three four five six three"
    assert answer.body.count(b"[DONE]") == 1
    assert (await router.stats()).continued == 6
    assert not any(router.hub.counters.cells)


async def test_deaths_without_progress_are_bounded(router: Harness) -> None:
    calls = 0

    async def first(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(SSE_HEAD)
        if calls == 1:
            writer.write(chunk(event(_delta("one"))))
        await writer.drain()
        await asyncio.sleep(0.005)
        writer.transport.abort()

    await router.table(model(a=[await router.engine(f"r{n}", first) for n in range(6)]))
    answer = await router.ask(stream=True)
    assert not answer.complete
    assert calls <= 4


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        ({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]}, "tool_call"),
        ({"reasoning_content": "hm"}, "reasoning"),
        ({"reasoning": "hm"}, "reasoning"),
        ({"refusal": "no"}, "refusal"),
    ],
)
async def test_half_a_tool_call_is_an_error_and_a_whole_one_the_end(
    router: Harness, delta: dict[str, Any], reason: str
) -> None:
    for finish in (None, "tool_calls"):

        async def dies(
            engine: Engine, request: Received, writer: asyncio.StreamWriter, finish: str | None = finish
        ) -> None:
            writer.write(SSE_HEAD + chunk(event(_delta(None, finish=None, **delta))))
            if finish:
                writer.write(chunk(event(_delta(None, finish=finish))))
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.transport.abort()

        await router.table(model(a=[await router.engine("one", dies), await router.engine("two", dies)]))
        answer = await router.ask(stream=True)
        assert answer.complete == bool(finish)
        if finish is None:
            assert f"can't be continued: {reason}".encode() in answer.body
