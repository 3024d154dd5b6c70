"""OpenAI's Responses: later calls find the engine that keeps a response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import yaml
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Harness,
    Received,
    chunk,
    hang,
    harness,
    model,
    post,
    until,
)

from modelfleet_serving.router.tenants import generate_key, hash_key


class Keeper:
    """An engine's responses, in its own memory as vLLM's and SGLang's are."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, object]] = {}

    async def __call__(self, engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        method, path, _ = request.line.split(" ")
        if path == "/v1/responses":
            body = request.json()
            if body.get("previous_response_id", next(iter(self.kept), None)) not in (None, *self.kept):
                return self._answer(writer, 404, {"error": {"message": "not found", "code": None}})
            entry = {
                "id": f"resp_{engine.name}-{len(self.kept)}",
                "object": "response",
                "created_at": 1,
                "model": "m",
                "status": "completed",
                "output": [],
                "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            }
            self.kept[str(entry["id"])] = entry
            if not body.get("stream"):
                return self._answer(writer, 200, entry)
            writer.write(SSE_HEAD)
            for kind in ("response.created", "response.completed"):
                data = json.dumps({"type": kind, "response": entry, "sequence_number": 0})
                writer.write(chunk(f"event: {kind}\ndata: {data}\n\n".encode()))
                await asyncio.sleep(0.005)
            writer.write(b"0\r\n\r\n")
            return None
        name = path.partition("?")[0].split("/")[3]
        if name not in self.kept:
            return self._answer(writer, 404, {"error": {"message": "not found", "code": None}})
        if method == "DELETE":
            del self.kept[name]
            return self._answer(writer, 200, {"id": name, "object": "response", "deleted": True})
        if path.endswith("/input_items"):
            return self._answer(writer, 200, {"object": "list", "data": [], "has_more": False})
        return self._answer(
            writer, 200, self.kept[name] | ({"status": "cancelled"} if "cancel" in path else {})
        )

    def _answer(self, writer: asyncio.StreamWriter, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % (status, len(data)) + data)


@pytest.fixture
async def client(router: Harness) -> AsyncIterator[openai.AsyncOpenAI]:
    await router.table(model(a=[await router.engine(f"r{n}", Keeper()) for n in range(4)]))
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def test_responses_are_found_again(client: openai.AsyncOpenAI) -> None:
    made = [(await client.responses.create(model="m", input="hi")).id for _ in range(8)]
    async with await client.responses.create(model="m", input="hi", stream=True) as stream:
        made += [event.response.id async for event in stream if event.type == "response.completed"]
    assert len({name.split("-")[0] for name in made}) > 1
    for name in made:
        assert (await client.responses.retrieve(name)).id == name
        assert (await client.responses.cancel(name)).status == "cancelled"
        assert (await client.responses.input_items.list(name)).data == []
        follow = await client.responses.create(model="m", input="and?", previous_response_id=name)
        assert follow.id.split("-")[0] == name.split("-")[0]
        await client.responses.delete(name)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(name)


async def test_unknown_responses_and_methods(router: Harness, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not known") as caught:
        await client.responses.retrieve("resp_nobody")
    assert caught.value.code == "response_not_found"
    for method, path, status in (
        ("PUT", "/v1/responses/resp_x", 405),
        ("GET", "/v1/responses/resp_x/cancel", 405),
        ("POST", "/v1/responses/resp_x/other", 404),
        ("GET", "/v1/responses/", 404),
    ):
        answer = await router.ask(
            f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode()
        )
        assert answer.status == status, path


async def test_an_engine_that_is_gone_or_busy(router: Harness) -> None:
    keeper = await router.engine("r1", Keeper())
    table = model(a=[keeper])
    table["variants"][0]["endpoints"][0]["capacity"] = 1
    await router.table(table)
    made = (await router.ask(post("/v1/responses"))).json()["id"]
    keeping, keeper.handler = keeper.handler, hang
    busy = await router.client()
    busy.send(post())
    await until(lambda: router.worker.active)
    keeper.handler = keeping
    ask = f"GET /v1/responses/{made} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    assert (await router.ask(ask)).status == 200  # costs the engine nothing: no place is needed
    await busy.close()
    await router.table(model(a=[await router.engine("r2", Keeper())]))
    assert (await router.ask(ask)).status == 404
    answer = await router.ask(post("/v1/responses", previous_response_id=made))
    assert answer.status == 404  # by the word of an engine
    assert not any(router.hub.counters.cells)


async def test_tenants_find_only_their_own(tmp_path: Path) -> None:
    keys = {name: generate_key() for name in ("a", "b")}
    entries = [{"name": name, "hash": hash_key(key)} for name, key in keys.items()]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    async with harness(tenants=str(tmp_path / "keys.yaml")) as router:
        await router.table(model(a=[await router.engine("r1", Keeper())]))
        bearer = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
        made = (await router.ask(post("/v1/responses", headers=bearer["a"]))).json()["id"]
        for name, status in (("a", 200), ("b", 404)):
            head = (
                f"GET /v1/responses/{made} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keys[name]}\r\n\r\n"
            )
            assert (await router.ask(head.encode())).status == status
        assert (
            await router.ask(f"GET /v1/responses/{made} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        ).status == 401
