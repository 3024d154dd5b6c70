"""Scale from zero, and many that wait: through the whole router."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import yaml
from tests.unit.router.harness import Engine, Harness, Received, answer_json, harness, model, post, until

from modelfleet_serving.router.tenants import generate_key, hash_key


def _at_zero(engine: Engine, **queue: Any) -> dict[str, Any]:
    table = model(a=[engine], queue={"maxRequests": 100, "timeoutSeconds": 30.0, **queue})
    table["variants"][0]["endpoints"] = []
    return table


def _ready(table: dict[str, Any], engine: Engine, capacity: int) -> dict[str, Any]:
    endpoints = [{"id": engine.name, "url": engine.url, "capacity": capacity}]
    return {**table, "variants": [{"name": "a", "endpoints": endpoints}]}


async def test_a_flood_before_the_first_engine_is_served_within_its_capacity(router: Harness) -> None:
    most, running = 0, 0

    async def counts(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        await answer_json(engine, request, writer)

    engine = await router.engine("r1", counts)
    table = _at_zero(engine)
    await router.table(table)
    waiting = [asyncio.create_task(router.ask()) for _ in range(130)]
    await until(lambda: sum(task.done() for task in waiting) == 30)
    refused = [task.result() for task in waiting if task.done()]
    assert {answer.status for answer in refused} == {429}
    assert all(1 <= int(answer.headers["retry-after"]) <= 120 for answer in refused)
    await router.table(_ready(table, engine, 4))
    served = [(await task).status for task in waiting if task not in refused]
    assert served.count(200) == 100
    assert most == 4
    assert not any(router.hub.counters.cells)


async def test_clients_that_leave_the_queue_make_room(router: Harness) -> None:
    engine = await router.engine("r1")
    table = _at_zero(engine, maxRequests=3)
    await router.table(table)
    clients = [await router.client() for _ in range(3)]
    for client in clients:
        client.send(post())
    await until(lambda: router.worker.dispatcher.waiting.number == 3)
    assert (await router.ask()).status == 429
    await clients[0].close()
    await until(lambda: router.worker.dispatcher.waiting.number == 2)
    last = asyncio.create_task(router.ask())
    await until(lambda: router.worker.dispatcher.waiting.number == 3)
    await router.table(_ready(table, engine, 1))
    assert (await last).status == 200
    assert [(await client.answer()).status for client in clients[1:]] == [200, 200]
    assert len(engine.requests) == 3


async def test_a_busy_tenant_does_not_starve_another(tmp_path: Path) -> None:
    keys = {name: generate_key() for name in ("busy", "quiet")}
    entries = [{"name": name, "hash": hash_key(key)} for name, key in keys.items()]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    async with harness(tenants=str(tmp_path / "keys.yaml")) as router:
        order: list[str] = []

        async def notes(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            order.append(request.headers["x-who"])
            await answer_json(engine, request, writer)

        engine = await router.engine("r1", notes)
        table = _at_zero(engine, maxRequests=20)
        await router.table(table)
        asked = []
        for name, number in (("busy", 20), ("quiet", 4)):
            headers = {"authorization": f"Bearer {keys[name]}", "x-who": name}
            asked += [asyncio.create_task(router.ask(post(headers=headers))) for _ in range(number)]
            await until(lambda: len(router.worker.active) == 20)
        await until(lambda: sum(task.done() for task in asked) == 4)
        await router.table(_ready(table, engine, 1))
        statuses = [(await task).status for task in asked]
        # The flood's newest gave way, and the others took turns with it.
        assert statuses[-4:] == [200] * 4
        assert statuses.count(429) == 4
        assert order[:8].count("quiet") == 4


async def test_an_engine_that_flaps_loses_nothing(router: Harness) -> None:
    engine = await router.engine("r1")
    table = _at_zero(engine)
    ready = _ready(table, engine, 2)
    asked: list[asyncio.Task[Any]] = []
    for turn in range(12):
        await router.table(table if turn % 2 else ready)
        asked += [asyncio.create_task(router.ask()) for _ in range(5)]
        await asyncio.sleep(0.002)
    await router.table(ready)
    assert {(await task).status for task in asked} == {200}
    assert len(engine.requests) == len(asked)
    assert not any(router.hub.counters.cells)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: router\r\n\r\n".encode()


async def test_a_suspended_model_answers_at_once(router: Harness) -> None:
    engine = await router.engine("r1")
    table = {**_at_zero(engine), "adapters": ["tuned"]}
    await router.table(table)
    waiting = [asyncio.create_task(router.ask()) for _ in range(2)]
    await until(lambda: router.worker.dispatcher.waiting.number == 2)
    other = model("other", a=[engine])
    await router.table({**table, "suspended": True}, other)
    refused = [await task for task in waiting]
    refused += [await router.ask(model=name) for name in ("m", "m:a", "tuned")]
    for answer in refused:
        assert (answer.status, answer.error["code"]) == (503, "model_suspended")
        assert "is suspended" in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
    assert router.worker.dispatcher.waiting.number == 0
    listed = (await router.ask(get("/v1/models"))).json()["data"]
    assert {entry["root"] for entry in listed} == {"other"}
    assert (await router.ask(get("/v1/models/m"))).status == 503
    assert (await router.ask(model="unknown")).status == 404
    await router.table(_ready(table, engine, 1), other)
    assert (await router.ask()).status == 200
