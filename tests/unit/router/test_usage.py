"""What tenants are charged for, whatever the API and the form of the answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Handler,
    Received,
    answer_json,
    chunk,
    event,
    harness,
    model,
    post,
    until,
)

from modelfleet_serving.router.tenants import generate_key, hash_key

KEY = generate_key()
AUTH = {"authorization": f"Bearer {KEY}"}


def _lines(*entries: Any) -> Handler:
    """Events as each API sends them, one to a chunk."""

    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for entry in entries:
            named = b"event: " + entry["type"].encode() + b"\n" if "type" in entry else b""
            writer.write(chunk(named + event(json.dumps(entry, separators=(",", ":")))))
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    return handler


def _json(entry: Any) -> Handler:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(entry).encode()
        half = len(body) // 2
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:half])
        await asyncio.sleep(0.005)
        writer.write(body[half:])

    return handler


FILLER = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x" * 50}}
ANSWERS = {
    "anthropic stream": (
        "/v1/messages",
        _lines(
            {
                "type": "message_start",
                "message": {"id": "1", "usage": {"input_tokens": 50, "output_tokens": 1}},
            },
            *[FILLER] * 20,
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 70}},
            {"type": "message_stop"},
        ),
    ),
    "anthropic stream with both in the end": (
        "/v1/messages",
        _lines(
            {
                "type": "message_start",
                "message": {"id": "1", "usage": {"input_tokens": 0, "output_tokens": 0}},
            },
            {"type": "message_delta", "usage": {"input_tokens": 50, "output_tokens": 70}},
            {"type": "message_stop"},
        ),
    ),
    "anthropic": ("/v1/messages", _json({"usage": {"input_tokens": 50, "output_tokens": 70}})),
    "responses stream": (
        "/v1/responses",
        _lines(
            {"type": "response.created", "response": {"id": "resp_1", "usage": None}},
            {"type": "response.output_text.delta", "delta": "x"},
            {
                "type": "response.completed",
                "response": {
                    "id": "resp_1",
                    "usage": {
                        "input_tokens": 50,
                        "input_tokens_details": {"cached_tokens": 7},
                        "output_tokens": 70,
                        "output_tokens_details": {"reasoning_tokens": 9},
                        "total_tokens": 120,
                    },
                    "user": None,
                },
            },
        ),
    ),
    "chat": (
        "/v1/chat/completions",
        _json(
            {
                "choices": [{"message": {"content": 'an object "usage": {"prompt_tokens": 1} in text'}}],
                "usage": {"prompt_tokens": 50, "total_tokens": 120, "completion_tokens": 70},
            }
        ),
    ),
    "chat with a long answer behind": (
        "/v1/chat/completions",
        _json(
            {
                "usage": {"prompt_tokens": 50, "completion_tokens": 70},
                "choices": [{"message": {"content": "y" * 5000}}],
            }
        ),
    ),
}


@pytest.mark.parametrize(("path", "handler"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_input_and_output_are_charged(path: str, handler: Handler, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    limits = {"inputTokensPerMinute": 10_000, "outputTokensPerMinute": 10_000}
    keys.write_text(yaml.safe_dump({"keys": [{"name": "a", "hash": hash_key(KEY), **limits}]}))
    async with harness(tenants=str(keys)) as router:
        await router.table(model(a=[await router.engine("r1", handler)]))
        streams = "stream" in next(name for name, entry in ANSWERS.items() if entry == (path, handler))
        for _ in range(2):
            answer = await router.ask(post(path, headers=AUTH, stream=streams))
            assert answer.complete
        stats = await router.stats()
        assert (stats.input_tokens, stats.output_tokens) == (100, 140)
        last = await router.ask(post(path, headers=AUTH, stream=streams))
        left = int(last.headers["x-ratelimit-remaining-tokens"])
        assert 10_000 - 100 - 40 <= left <= 10_000 - 100 + 20
        left = int(last.headers["x-ratelimit-remaining-output-tokens"])
        assert 10_000 - 140 <= left <= 10_000 - 140 + 20


async def test_leaving_before_the_usage_is_not_free(tmp_path: Path) -> None:
    async def endless(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for _ in range(50):
            writer.write(chunk(event({"choices": [{"index": 0, "delta": {"content": "x"}}]})))
            await writer.drain()
            await asyncio.sleep(0.001)
        await asyncio.Event().wait()

    keys = tmp_path / "keys.yaml"
    keys.write_text(
        yaml.safe_dump({"keys": [{"name": "a", "hash": hash_key(KEY), "outputTokensPerMinute": 1000}]})
    )
    for limit, least in ((None, 900), (800, 900)):
        async with harness(tenants=str(keys)) as router:
            await router.table(model(a=[await router.engine("r1", endless)]))
            client = await router.client()
            client.send(post(headers=AUTH, stream=True, **({"max_tokens": limit} if limit else {})))
            await client.head()
            for _ in range(50):
                await client.reader.readuntil(b"}]}\n\n")
            await client.close()
            await until(lambda: not router.worker.active)
            router.engines[0].handler = answer_json
            answer = await router.ask(post(headers=AUTH))
            assert least <= int(answer.headers["x-ratelimit-remaining-output-tokens"]) <= 965


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
async def test_usage_that_nobody_asked_for_is_left_out_however_it_is_written(
    tmp_path: Path, separators: tuple[str, str]
) -> None:
    async def tells(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        last = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
        for entry in ({"choices": [{"delta": {"content": "a"}}], "usage": None}, last, "[DONE]"):
            text = entry if isinstance(entry, str) else json.dumps(entry, separators=separators)
            writer.write(chunk(event(text)))
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    keys = tmp_path / "keys.yaml"
    keys.write_text(
        yaml.safe_dump({"keys": [{"name": "a", "hash": hash_key(KEY), "outputTokensPerMinute": 1000}]})
    )
    async with harness(tenants=str(keys)) as router:
        await router.table(model(a=[await router.engine("r1", tells)]))
        answer = await router.ask(post(headers=AUTH, stream=True))
        assert b"prompt_tokens" not in answer.body
        assert answer.body.count(b"data: ") == 2
        assert (await router.stats()).output_tokens == 7
