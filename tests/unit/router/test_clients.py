"""Clients that people use, as they come: their forms of requests, errors and streams."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
import websockets
import yaml
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Harness,
    Received,
    answer_json,
    chunk,
    event,
    hang,
    harness,
    model,
    until,
)

from modelfleet_serving.router.tenants import generate_key, hash_key

KEY = generate_key()


def _json(writer: asyncio.StreamWriter, body: Any) -> None:
    data = json.dumps(body).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
    )


async def engine_of_all(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    path = request.line.split(" ")[1].partition("?")[0]
    if path == "/v1/chat/completions":
        delta = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        if not request.json().get("stream"):
            message = {"role": "assistant", "content": "grüß 🦊"}
            _json(
                writer,
                {
                    "id": "c",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                },
            )
            return
        writer.write(SSE_HEAD)
        data = b"".join(
            event(
                json.dumps(
                    {**delta, "choices": [{"index": 0, "delta": {"content": text}}]}, ensure_ascii=False
                )
            )
            for text in ("grüß", " 🦊")
        ) + event("[DONE]")
        for start in range(0, len(data), 7):  # cut within characters
            writer.write(chunk(data[start : start + 7]))
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
    elif path == "/v1/embeddings":
        _json(
            writer,
            {
                "object": "list",
                "model": "m",
                "data": [{"object": "embedding", "index": 0, "embedding": [1.0]}],
                "usage": {"prompt_tokens": 1, "total_tokens": 1},
            },
        )
    elif path == "/v1/audio/transcriptions":
        _json(writer, {"text": f"{len(request.body)} {request.headers['content-type'][:20]}"})
    elif path == "/v1/messages":
        if not request.json().get("stream"):
            _json(
                writer,
                {
                    "id": "msg",
                    "type": "message",
                    "role": "assistant",
                    "model": "m",
                    "content": [{"type": "text", "text": "hi"}],
                    "stop_reason": "end_turn",
                    "usage": {"input_tokens": 1, "output_tokens": 2},
                },
            )
            return
        writer.write(SSE_HEAD)
        for entry in (
            {
                "type": "message_start",
                "message": {
                    "id": "msg",
                    "type": "message",
                    "role": "assistant",
                    "model": "m",
                    "content": [],
                    "usage": {"input_tokens": 1, "output_tokens": 0},
                },
            },
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        ):
            writer.write(chunk(f"event: {entry['type']}\n".encode() + event(entry)))
        writer.write(b"0\r\n\r\n")
    else:
        await answer_json(engine, request, writer)


@pytest.fixture
async def served(router: Harness) -> Harness:
    await router.table(model(bf16=[await router.engine("r1", engine_of_all)], adapters=["tuned"]))
    return router


def _openai(router: Harness, **options: Any) -> openai.AsyncOpenAI:
    options = {"api_key": KEY, "max_retries": 0, **options}
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", **options)


async def test_openai_python(served: Harness) -> None:
    async with _openai(served) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        answer = await client.chat.completions.with_raw_response.create(model="m:bf16", messages=messages)
        assert answer.headers["x-modelfleet-variant"] == "bf16"
        assert answer.request_id
        assert answer.parse().choices[0].message.content == "grüß 🦊"
        stream = await client.chat.completions.create(model="tuned", messages=messages, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "grüß 🦊"
        async with client.chat.completions.with_streaming_response.create(
            model="m", messages=messages, stream=True
        ) as raw:
            assert [line async for line in raw.iter_lines()][-2] == "data: [DONE]"
        assert (await client.embeddings.create(model="m", input="x", encoding_format="float")).data[
            0
        ].embedding == [1.0]
        file = ("a.wav", io.BytesIO(b"\0\r\n--x\r\n" * 1000))
        text = (await client.audio.transcriptions.create(model="m:bf16", file=file)).text
        assert "multipart/form-data" in text
        assert b'name="model"\r\n\r\nm\r\n' in served.engines[0].requests[-1].body
        assert {entry.id async for entry in client.models.list()} == {"m", "m:bf16", "tuned", "tuned:bf16"}
        assert (await client.models.retrieve("m:bf16")).id == "m:bf16"
        with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
            await client.models.retrieve("none")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="", messages=messages)


async def test_openai_python_in_a_thread(served: Harness) -> None:
    def talk() -> str:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0
        ) as client:
            stream = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            return "".join(c.choices[0].delta.content or "" for c in stream)

    assert await asyncio.to_thread(talk) == "grüß 🦊"


async def test_a_client_that_gives_up_frees_its_engine(router: Harness) -> None:
    engine = await router.engine("r1", hang)
    await router.table(model(a=[engine]))
    async with _openai(router) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.1).chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}]
            )
    await asyncio.wait_for(engine.closed.wait(), 5)
    await until(lambda: not router.worker.active)
    assert not any(router.hub.counters.cells)


async def test_limits_as_openai_python_sees_them(tmp_path: Path) -> None:
    keys = [
        {"name": "a", "hash": hash_key(KEY), "models": ["m:bf16"], "requestsPerMinute": 1, "priority": "low"}
    ]
    (tmp_path / "k.yaml").write_text(yaml.safe_dump({"keys": keys}))
    async with harness(tenants=str(tmp_path / "k.yaml")) as router:
        await router.table(model(bf16=[await router.engine("r1", engine_of_all)]), model("other", a=[]))
        messages: Any = [{"role": "user", "content": "hi"}]
        async with _openai(router) as client, _openai(router, api_key="sk-wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="m", messages=messages)
            with pytest.raises(openai.PermissionDeniedError):
                await client.chat.completions.create(model="other", messages=messages)
            raw = await client.chat.completions.with_raw_response.create(model="m", messages=messages)
            assert raw.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(openai.RateLimitError) as limited:
                await client.chat.completions.create(model="m", messages=messages, stream=True)
            assert limited.value.code == "rate_limit_exceeded"
            assert limited.value.type == "rate_limit_error"
            assert int(limited.value.response.headers["retry-after"]) > 0
            assert limited.value.response.headers["x-ratelimit-reset-requests"]
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()


async def test_anthropic_python(served: Harness) -> None:
    options: Any = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}
    async with anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{served.port}", api_key=KEY, max_retries=0
    ) as client:
        assert (await client.messages.create(**options)).usage.output_tokens == 2
        async with client.messages.stream(**options) as stream:
            assert [text async for text in stream.text_stream] == ["hi"]
            assert (await stream.get_final_message()).usage.output_tokens == 2
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(**{**options, "model": "none"})
        body: Any = missing.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "not_found_error"
        assert (await client.models.list()).data[0].id == "m"

        async def breaks(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(SSE_HEAD + chunk(b"event: ping\n" + event({"type": "ping"})))
            await writer.drain()
            writer.transport.abort()

        served.engines[0].handler = breaks
        with pytest.raises(anthropic.APIStatusError):
            async with client.messages.stream(**options) as stream:
                await stream.get_final_message()


async def test_websockets(served: Harness) -> None:
    async def serve(connection: websockets.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with websockets.serve(serve, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        endpoints = [{"id": "ws", "url": f"http://127.0.0.1:{port}"}]
        await served.table({"name": "m", "variants": [{"name": "v", "endpoints": endpoints}]})
        address = f"ws://127.0.0.1:{served.port}/v1/realtime?model=m:v"
        async with websockets.connect(address) as one, websockets.connect(address) as two:
            for size in (1, 100, 200_000, 900_000):
                await asyncio.gather(one.send("x" * size), two.send(b"y" * size))
                assert await one.recv() == "x" * size
                assert await two.recv() == b"y" * size
            assert one.response is not None
            assert one.response.headers["x-modelfleet-replica"] == "ws"
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(address.replace("=m:v", "=none"))
        assert refused.value.response.status_code == 404
        await until(lambda: not served.worker.active)


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
async def test_curl(served: Harness, version: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}], "model": "m", "stream": True})
    process = await asyncio.create_subprocess_exec(
        curl, "-sS", "-N", version, "-H", "content-type: application/json", "-d", body,
        f"http://127.0.0.1:{served.port}/v1/chat/completions", "--next", "-sS", "-I", version,
        f"http://127.0.0.1:{served.port}/v1/models",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, problems = await process.communicate()
    assert process.returncode == 0, problems
    assert "grüß" in out.decode()
    assert b"data: [DONE]" in out
    assert b"200 OK" in out


async def test_keep_alive_clients(served: Harness) -> None:
    """Many requests over few connections, as Go, Java and Node pool them; bodies with unknown length too."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"messages":[],'
        await asyncio.sleep(0)
        yield b'"model":"m"}'

    connector = aiohttp.TCPConnector(limit=3)
    url = f"http://127.0.0.1:{served.port}/v1/chat/completions"
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(number: int) -> int:
            data = pieces() if number % 2 else b'{"messages":[],"model":"m"}'
            async with session.post(url, data=data, expect100=number % 3 == 0) as answer:
                await answer.read()
                return answer.status

        assert set(await asyncio.gather(*(one(n) for n in range(60)))) == {200}
        assert len(served.worker.clients) <= 3
