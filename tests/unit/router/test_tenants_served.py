"""Keys, limits, priorities and signs of life, through the whole router."""

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
    Harness,
    Received,
    answer_json,
    answer_status,
    chunk,
    die,
    event,
    hang,
    harness,
    model,
    post,
    stream,
    until,
)

from modelfleet_serving.router.tenants import generate_key, hash_key

KEY, OTHER = generate_key(), generate_key()


def _keys(path: Path, **limits: Any) -> str:
    keys = [
        {"name": "a", "hash": hash_key(KEY), **limits},
        {"name": "b", "hash": hash_key(OTHER), "models": ["other"]},
    ]
    path.write_text(yaml.safe_dump({"keys": keys}))
    return str(path)


def _auth(key: str = KEY, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **more}


async def _ready(router: Harness) -> Engine:
    engine = await router.engine("r1")
    await router.table(model(bf16=[engine], awq=[engine]), model("other", x=[engine]))
    return engine


async def test_keys_are_asked_for_and_never_passed_on(tmp_path: Path) -> None:
    async with harness(tenants=_keys(tmp_path / "keys.yaml")) as router:
        engine = await _ready(router)
        for headers in ({}, _auth("wrong"), {"authorization": "Basic eA=="}):
            answer = await router.ask(post(headers=headers))
            assert answer.status == 401
            assert answer.error["type"] == "authentication_error"
            assert "www-authenticate" in answer.headers
        assert (await router.ask(post(headers=_auth(OTHER)))).status == 403
        assert (await router.ask(post(headers=_auth()))).status == 200
        assert (await router.ask(post(headers={"x-api-key": KEY}))).status == 200
        assert all(not {"authorization", "x-api-key"} & set(request.headers) for request in engine.requests)
        listing = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n"
        assert (await router.ask(listing % b"x")).status == 401
        names = {entry["id"] for entry in (await router.ask(listing % OTHER.encode())).json()["data"]}
        assert names == {"other", "other:x"}
        assert (await router.ask(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200
        client = await router.client()
        client.send(post(headers=_auth("wrong")) + post(headers=_auth()))
        assert [(await client.answer()).status for _ in range(2)] == [401, 200]
        client.send(post(body=b"x" * 100_000, headers=_auth("wrong", **{"content-length": "50000000"})))
        assert (await client.answer()).status == 401


async def test_without_keys_credentials_pass(router: Harness) -> None:
    engine = await _ready(router)
    await router.ask(post(headers=_auth("engine-key")))
    assert engine.requests[0].headers["authorization"] == "Bearer engine-key"


async def test_request_limit(tmp_path: Path) -> None:
    async with harness(tenants=_keys(tmp_path / "keys.yaml", requestsPerMinute=2)) as router:
        await _ready(router)
        first = await router.ask(post(headers=_auth()))
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        await router.ask(post(headers=_auth()))
        answer = await router.ask(post(headers=_auth()))
        assert answer.status == 429
        assert answer.error["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1


async def test_tokens_are_counted_by_the_engines_usage_and_kept_from_who_did_not_ask(tmp_path: Path) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 70}}

    async def answers(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        wanted = (request.json().get("stream_options") or {}).get("include_usage")
        events = ["hello", *([json.dumps(usage, separators=(",", ":"))] if wanted else [])]
        await stream(*events)(engine, request, writer)

    limits = {"inputTokensPerMinute": 1000, "outputTokensPerMinute": 100}
    async with harness(tenants=_keys(tmp_path / "keys.yaml", **limits)) as router:
        engine = await _ready(router)
        engine.handler = answers
        answer = await router.ask(post(headers=_auth(), stream=True))
        assert answer.body == event("hello") + event("[DONE]")
        assert engine.requests[0].json()["stream_options"] == {"include_usage": True}
        answer = await router.ask(post(headers=_auth(), stream=True, stream_options={"include_usage": True}))
        assert b'"usage"' in answer.body
        assert int(answer.headers["x-ratelimit-remaining-output-tokens"]) <= 30
        assert (await router.ask(post(headers=_auth(), max_tokens=50))).status == 429
        totals = [stats for stats in (await router.hub.snapshot()).variants if stats.output_tokens]
        assert sum(stats.output_tokens for stats in totals) == 140


async def test_concurrency_limit_frees_when_the_client_leaves(tmp_path: Path) -> None:
    async with harness(tenants=_keys(tmp_path / "keys.yaml", concurrency=1)) as router:
        engine = await _ready(router)
        engine.handler = hang
        client = await router.client()
        client.send(post(headers=_auth()))
        await until(lambda: engine.requests)
        assert (await router.ask(post(headers=_auth()))).status == 429
        await client.close()
        engine.handler = answer_json
        await until(lambda: not router.worker.active)
        assert (await router.ask(post(headers=_auth()))).status == 200


async def test_keys_are_reread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfleet_serving.router.tenancy.POLL_SECONDS", 0.02)
    path = tmp_path / "keys.yaml"
    async with harness(tenants=_keys(path)) as router:
        await _ready(router)
        new = generate_key()
        path.write_text("keys: [{name: bad}]")
        await asyncio.sleep(0.1)
        assert (await router.ask(post(headers=_auth()))).status == 200
        path.write_text(yaml.safe_dump({"keys": [{"name": "a", "hash": hash_key(new)}]}))
        for _ in range(100):
            if (await router.ask(post(headers=_auth(new)))).status == 200:
                break
            await asyncio.sleep(0.02)
        assert (await router.ask(post(headers=_auth()))).status == 401


async def test_higher_classes_are_served_first(router: Harness) -> None:
    order: list[str] = []

    async def notes(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        order.append(request.headers["x-request-id"])
        await answer_json(engine, request, writer)

    engine = await router.engine("r1", notes)
    table = model(a=[engine])
    table["variants"][0]["endpoints"][0] |= {"state": "Starting", "capacity": 1}
    await router.table(table)
    clients = []
    for name in ("low", "normal", "high"):
        for number in range(2):
            client = await router.client()
            client.send(post(headers={"x-modelfleet-priority": name, "x-request-id": f"{name}-{number}"}))
            clients.append(client)
            await until(lambda: len(router.worker.active) == len(clients))
    assert (await router.ask(post(headers={"x-modelfleet-priority": "urgent"}))).status == 400
    table["variants"][0]["endpoints"][0]["state"] = "Ready"
    await router.table(table)
    for client in clients:
        assert (await client.answer()).status == 200
    assert order.index("high-1") < order.index("normal-1") < order.index("low-1")


async def test_waiting_streams_get_signs_of_life_when_they_ask(router: Harness) -> None:
    engine = await router.engine("r1", stream({"n": 1}))
    table = model(queue={"maxRequests": 10, "timeoutSeconds": 0.6}, a=[engine])
    table["variants"][0]["endpoints"][0]["state"] = "Starting"
    await router.table(table)
    wish = {"x-modelfleet-keepalive": "0.1"}
    client, late = await router.client(), await router.client()
    client.send(post(stream=True, headers=wish))
    assert (await client.head())[0] == 200
    for _ in range(2):
        assert await client.reader.readuntil(b"\n\n\r\n") == chunk(b": waiting\n\n")
    table["variants"][0]["endpoints"][0]["state"] = "Ready"
    await router.table(table)
    body, complete = await client.chunks()
    assert complete
    assert body.replace(b": waiting\n\n", b"") == event({"n": 1}) + event("[DONE]")
    client.send(post())
    assert (await client.answer()).status == 200
    table["variants"][0]["endpoints"][0]["state"] = "Starting"
    await router.table(table)
    late.send(post(stream=True, headers=wish))
    answer = await late.answer()
    assert answer.complete
    assert b'"queue_timeout"' in answer.body


async def test_signs_of_life_during_a_prefill_and_between_events(router: Harness) -> None:
    go, on = asyncio.Event(), asyncio.Event()

    async def slow(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(SSE_HEAD + chunk(event({"n": 1})))
        await on.wait()
        writer.write(chunk(event("[DONE]")) + b"0\r\n\r\n")

    await router.table(model(a=[await router.engine("r1", slow)]))
    client, silent = await router.client(), await router.client()
    client.send(post(stream=True, headers={"x-modelfleet-keepalive": "0.05"}))
    silent.send(post(stream=True))
    sign = chunk(b": waiting\n\n")
    assert (await client.head())[0] == 200
    assert await client.reader.readexactly(2 * len(sign)) == sign * 2
    go.set()
    assert (await client.reader.readuntil(chunk(event({"n": 1})))).replace(sign, b"") == chunk(
        event({"n": 1})
    )
    assert await client.reader.readexactly(2 * len(sign)) == sign * 2
    on.set()
    body, complete = await client.chunks()
    assert complete
    assert body.replace(b": waiting\n\n", b"") == event("[DONE]")
    assert b"waiting" not in (await silent.answer()).body
    client.send(post())
    await until(lambda: not router.worker.dispatcher.waiting.kept_alive)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b"content-length: 52\r\n\r\n" + b'{"error": {"message": "too\\n long", "type": "x"}}   ',
            b'"too\\n long"',
        ),
        (b"transfer-encoding: chunked\r\n\r\n5\r\nwhat?\r\n0\r\n\r\n", b"answered 400: what?"),
        (b"content-length: 0\r\n\r\n", b"answered 400"),
        (b"connection: close\r\n\r\nclosed", b"answered 400: closed"),
    ],
)
async def test_an_engines_refusal_reaches_a_stream_that_was_opened_before_it(
    router: Harness, answer: bytes, said: bytes
) -> None:
    go = asyncio.Event()

    async def refuses(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(b"HTTP/1.1 400 No\r\n" + answer)
        if b"close" in answer:
            await writer.drain()
            writer.close()

    await router.table(model(a=[await router.engine("r1", refuses)]))
    for path in ("/v1/chat/completions", "/v1/messages"):
        go.clear()
        client = await router.client()
        client.send(post(path, stream=True, headers={"x-modelfleet-keepalive": "0.05"}))
        assert (await client.head())[0] == 200
        go.set()
        body, complete = await client.chunks()
        assert complete
        events = [entry for entry in body.split(b"\n\n") if entry and not entry.startswith(b":")]
        assert len(events) == 1
        assert said in events[0]
        assert events[0].startswith(b"event: error\ndata: " if "messages" in path else b"data: ")
        json.loads(events[0].partition(b"data: ")[2])
        client.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer()).status == 200
    assert (await router.stats()).statuses == {400: 2}


async def test_access_log_names_everything_but_the_key(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    async with harness(tenants=_keys(tmp_path / "keys.yaml"), access_log=str(log)) as router:
        await _ready(router)
        await router.ask(post(model="m:awq", headers=_auth(**{"x-request-id": "q1"})))
        await router.ask(post(headers=_auth("wrong-key")))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 401]
    expected = {
        "model": "m",
        "variant": "awq",
        "replica": "r1",
        "tenant": "a",
        "request": "q1",
        "input_tokens": 3,
    }
    assert expected.items() <= lines[0].items()
    assert lines[0]["client"].startswith("127.0.0.1:")
    assert KEY not in log.read_text()
    assert "wrong-key" not in log.read_text()


async def test_a_mounted_secret_is_followed_while_requests_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes swaps ``..data``: every moment has the old keys or the new ones."""
    monkeypatch.setattr("modelfleet_serving.router.tenancy.POLL_SECONDS", 0.01)

    def version(number: int, **files: str) -> None:
        directory = tmp_path / f"..v{number}"
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
        (tmp_path / "..new").symlink_to(directory.name)
        (tmp_path / "..new").replace(tmp_path / "..data")

    def entry(*keys: str, **more: Any) -> str:
        return yaml.safe_dump({"hashes": [hash_key(key) for key in keys], **more})

    version(1, team=entry(KEY, models=["m"]))
    (tmp_path / "team").symlink_to("..data/team")
    async with harness(tenants=str(tmp_path)) as router:
        engine = await _ready(router)
        engine.handler = hang
        running = await router.client()
        running.send(post(headers=_auth()))
        await until(lambda: engine.requests)
        assert (await router.ask(post(headers=_auth(OTHER)))).status == 401
        engine.handler = answer_json
        for number, text, old, new in (
            (2, entry(KEY, OTHER), 200, 200),  # both while one is exchanged for the other
            (3, "hash: [", 200, 200),  # a fault changes nothing
            (4, entry("no-key", models="*"), 200, 200),
            (5, entry(OTHER), 401, 200),
        ):
            version(number, team=text)
            await _until_statuses(router, {KEY: old, OTHER: new})
        (tmp_path / "second").symlink_to("..data/second")
        version(6, team=entry(OTHER, models=["other"]), second=entry(KEY, name="b"))
        await _until_statuses(router, {KEY: 200, OTHER: 403})
        assert router.worker.active  # what ran, runs
        await running.close()


async def _until_statuses(router: Harness, expected: dict[str, int]) -> None:
    deadline = asyncio.get_running_loop().time() + 5
    while True:
        found = {key: (await router.ask(post(headers=_auth(key)))).status for key in expected}
        if found == expected:
            break
        assert asyncio.get_running_loop().time() < deadline, (found, expected)
    for _ in range(5):  # and it stays
        await asyncio.sleep(0.02)
        assert {key: (await router.ask(post(headers=_auth(key)))).status for key in expected} == expected


async def test_no_end_of_a_request_leaks_its_place(tmp_path: Path) -> None:
    """Disconnects in each state, retries, errors, refusals: afterwards the tenant has all of its places."""
    async with harness(
        tenants=_keys(tmp_path / "keys.yaml", concurrency=3, requestsPerMinute=10_000),
        first_byte_timeout=0.1,
        max_attempts=2,
    ) as router:
        engine = await _ready(router)

        async def dies_later(one: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(SSE_HEAD + chunk(event({"n": 1})))
            await writer.drain()
            writer.transport.abort()

        for handler in (answer_json, hang, die, dies_later, answer_status(500), answer_status(429)):
            engine.handler = handler
            answer = await router.ask(post(headers=_auth(), stream=True))
            assert answer.status in (200, 429, 500, 502, 503, 504)
            for leaves in range(3):
                client = await router.client()
                client.send(post(headers=_auth(), stream=True))
                if leaves:
                    await asyncio.sleep(0.01 * leaves)
                await client.close()
        for body in (b"{", b'{"model": "none"}', b'{"model": "m:none"}', b"[]"):
            assert (await router.ask(post(body=body, headers=_auth()))).status in (400, 404)
        table = model(bf16=[engine], queue={"maxRequests": 2, "timeoutSeconds": 0.1})
        table["variants"][0]["endpoints"][0]["state"] = "Starting"
        await router.table(table)
        waiting = [asyncio.create_task(router.ask(post(headers=_auth()))) for _ in range(3)]
        assert sorted([(await task).status for task in waiting]) == [429, 504, 504]
        await until(lambda: not router.worker.active)
        assert not any(router.hub.counters.tenants.running)
        assert not any(router.hub.counters.cells)
        assert not any(router.hub.counters.reading)


@pytest.mark.parametrize(
    ("asked", "status"), [("5", 200), ("-5", 200), ("HIGH", 200), ("6", 400), ("1.5", 400), ("", 400)]
)
async def test_a_priority_is_read_whether_or_not_the_request_waits(
    router: Harness, asked: str, status: int
) -> None:
    await _ready(router)
    answer = await router.ask(post(headers={"x-modelfleet-priority": asked}))
    assert answer.status == status
