"""The openai package against the router: what it sends, and how it reads what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import openai
import pytest
from tests.unit.router.harness import Engine, Harness, Received, die, harness, model, stream


def _chunk(text: str) -> dict[str, object]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


async def _answers(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    if request.json().get("stream"):
        await stream(_chunk("one"), _chunk(" two"))(engine, request, writer)
        return
    message = {"role": "assistant", "content": f"from {engine.name}"}
    answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    body = json.dumps(
        {**answer, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    ).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )


@pytest.fixture
async def client(router: Harness) -> AsyncIterator[openai.AsyncOpenAI]:
    await router.table(
        model(
            weights={"a": 1, "b": 0},
            a=[await router.engine("one", _answers)],
            b=[await router.engine("two", _answers)],
        )
    )
    base = f"http://127.0.0.1:{router.port}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0, timeout=10) as made:
        yield made


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_chat_variant_stream_and_models(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "from one"
    answer = await client.chat.completions.create(model="m:b", messages=MESSAGES)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "from two"
    events = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
    assert "".join([event.choices[0].delta.content async for event in events]) == "one two"
    assert [entry.id async for entry in client.models.list()] == ["m", "m:a", "m:b"]
    assert (await client.models.retrieve("m:a")).id == "m:a"
    with pytest.raises(openai.NotFoundError, match="models are: m"):
        await client.chat.completions.create(model="nope", messages=MESSAGES)  # type: ignore[arg-type]


async def test_a_stream_that_breaks_off_is_an_error(client: openai.AsyncOpenAI) -> None:
    async with harness() as router:
        await router.table(model(a=[await router.engine("bad", die)]))
        broken = client.with_options(base_url=f"http://127.0.0.1:{router.port}/v1")
        with pytest.raises(openai.InternalServerError):
            await broken.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
