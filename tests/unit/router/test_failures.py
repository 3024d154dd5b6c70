"""Engines that fail: retried before the first byte, elsewhere or not at all, and said so."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Handler,
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
    until,
)

from modelfleet_serving.contract import EndpointState


@pytest.mark.parametrize("handler", [die, answer_status(500), answer_status(503), "refused"])
async def test_a_failed_attempt_is_answered_by_another_replica(router: Harness, handler: Handler) -> None:
    bad, good = await router.engine("bad"), await router.engine("good")
    if handler == "refused":
        await bad.stop()
    else:
        bad.handler = handler
    await router.table(model(affinity="None", a=[bad, good]))
    for _ in range(100):
        answer = await router.ask()
        assert answer.status == 200
        assert answer.json()["engine"] == "good"
        assert "x-modelfleet-fallback" not in answer.headers
        if (await router.stats()).retries:
            return
    raise AssertionError("the bad engine was never tried")


async def test_an_engine_that_is_gone_costs_no_answer_while_others_are_ejected(router: Harness) -> None:
    """Two of four fail, as many as may be ejected for that; the third vanishes, and the budget is spent."""
    sick = [await router.engine(f"sick{n}", answer_status(500)) for n in range(2)]
    gone, good = await router.engine("gone"), await router.engine("good")
    await router.table(model(affinity="None", a=[*sick, gone, good]))
    variant = router.worker.table.models["m"].variants["a"]
    for _ in range(200):
        await router.ask()
        if len(variant.pool.groups[0].members) == 2:
            break
    await gone.stop()
    budget = router.worker.table.models["m"].budget
    for _ in range(30):
        while budget.take(router.worker.loop.time()):
            pass
        answer = await router.ask()
        assert (answer.status, answer.json().get("engine")) == (200, "good")


async def test_fallback_variant_serves_and_says_from_where(router: Harness) -> None:
    bad, good = await router.engine("bad", die), await router.engine("good")
    await router.table(model(weights={"a": 100, "b": 0}, fallback=["b", "a"], a=[bad], b=[good]))
    answer = await router.ask()
    assert answer.status == 200
    assert answer.headers["x-modelfleet-variant"] == "b"
    assert answer.headers["x-modelfleet-fallback"] == "a"


async def test_fallback_when_the_chosen_variant_is_not_ready(router: Harness) -> None:
    off, good = await router.engine("off"), await router.engine("good")
    table = model(weights={"a": 100, "b": 0}, fallback=["b"], a=[off], b=[good])
    for state in ("Starting", "Draining", "Sleeping", "Failed"):
        table["variants"][0]["endpoints"][0]["state"] = state
        await router.table(table)
        assert (await router.ask()).headers["x-modelfleet-fallback"] == "a"
    assert not off.requests


async def test_a_pinned_variant_never_falls_back(router: Harness) -> None:
    bad, good = await router.engine("bad", die), await router.engine("good")
    await router.table(model(weights={"a": 1, "b": 1}, fallback=["b", "a"], a=[bad], b=[good]))
    answer = await router.ask(model="m:a")
    assert answer.status in (502, 503)
    assert answer.headers["retry-after"]
    assert not good.requests


async def test_the_engines_own_error_passes_when_nobody_does_better(router: Harness) -> None:
    await router.table(model(a=[await router.engine("r1", answer_status(500))]))
    answer = await router.ask()
    assert answer.status == 500
    assert answer.body == b"no"
    assert answer.headers["x-modelfleet-replica"] == "r1"


async def test_client_errors_of_the_engine_are_not_retried(router: Harness) -> None:
    one, two = await router.engine("one", answer_status(400)), await router.engine("two", answer_status(400))
    await router.table(model(a=[one, two]))
    assert (await router.ask()).status == 400
    assert len(one.requests) + len(two.requests) == 1


async def test_attempts_are_bounded(router: Harness) -> None:
    engines = [await router.engine(f"r{n}", die) for n in range(6)]
    await router.table(model(a=engines))
    answer = await router.ask()
    assert answer.status in (502, 503)
    assert "3 engines were tried" in answer.error["message"]
    assert sum(len(engine.requests) for engine in engines) == 3


async def test_an_idle_connection_that_the_engine_closed_costs_nothing(router: Harness) -> None:
    async def once(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await answer_json(engine, request, writer)
        await writer.drain()
        if len(engine.requests) == 2:
            writer.transport.abort()  # instead of an answer to the next one

    async def second_time_unlucky(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        if len(engine.requests) == 2:
            writer.transport.abort()
        else:
            await answer_json(engine, request, writer)

    engine = await router.engine("r1", second_time_unlucky)
    await router.table(model(a=[engine]))
    client = await router.client()
    for _ in range(3):
        client.send(post())
        assert (await client.answer()).status == 200
    assert engine.connections == 2


async def test_first_byte_timeout() -> None:
    async with harness(first_byte_timeout=0.2) as router:
        slow, good = await router.engine("slow", hang), await router.engine("good")
        await router.table(model(weights={"a": 1, "b": 0}, fallback=["b"], a=[slow], b=[good]))
        answer = await router.ask()
        assert answer.headers["x-modelfleet-fallback"] == "a"
        assert slow.closed.is_set()
        assert (await router.ask(model="m:a")).status == 504


async def test_deadline_of_the_request(router: Harness) -> None:
    slow = await router.engine("slow", hang)
    await router.table(model(a=[slow]))
    answer = await router.ask(post(headers={"x-modelfleet-timeout": "0.2"}))
    assert answer.status == 504
    assert answer.error["code"] == "deadline_exceeded"
    await asyncio.wait_for(slow.closed.wait(), 5)
    for wrong in ("soon", "-1", "nan", "inf"):
        assert (await router.ask(post(headers={"x-modelfleet-timeout": wrong}))).status == 400


async def test_an_engine_that_breaks_http_is_a_502(router: Harness) -> None:
    async def nonsense(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")

    await router.table(model(a=[await router.engine("r1", nonsense)]))
    answer = await router.ask()
    assert answer.status == 502
    assert "HTTP" in answer.error["message"]


async def test_requests_wait_for_an_engine_that_becomes_ready(router: Harness) -> None:
    engine = await router.engine("r1")
    empty = model(a=[engine])
    empty["variants"][0]["endpoints"] = []
    await router.table(empty)
    clients = [await router.client() for _ in range(5)]
    for client in clients:
        client.send(post())
    await until(lambda: len(router.worker.active) == 5)
    (report,) = [
        entry for entry in (await router.hub.demand(1.0, router.worker.now())).models if not entry.variant
    ]
    assert (report.queued, report.requests) == (5, 5)
    await clients[0].close()
    await until(lambda: len(router.worker.active) == 4)
    await router.table(model(a=[engine]))
    for client in clients[1:]:
        assert (await client.answer()).status == 200
    assert len(engine.requests) == 4


async def test_queue_limits(router: Harness) -> None:
    engine = await router.engine("r1")
    table = model(queue={"maxRequests": 2, "timeoutSeconds": 0.3}, a=[engine])
    table["variants"][0]["endpoints"][0]["state"] = "Starting"
    await router.table(table)
    clients = [await router.client() for _ in range(2)]
    for client in clients:
        client.send(post())
    await until(lambda: len(router.worker.active) == 2)
    answer = await router.ask()
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    for client in clients:
        answer = await client.answer()
        assert answer.status == 504
        assert answer.error["code"] == "queue_timeout"
    table["queue"]["maxRequests"] = 0
    await router.table(table)
    assert (await router.ask()).status == 503


async def test_capacity_bounds_what_runs(router: Harness) -> None:
    release = asyncio.Event()

    async def slow(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await answer_json(engine, request, writer)

    engine = await router.engine("r1", slow)
    table = model(a=[engine])
    table["variants"][0]["endpoints"][0]["capacity"] = 2
    await router.table(table)
    clients = [await router.client() for _ in range(5)]
    for client in clients:
        client.send(post())
    await until(lambda: len(router.worker.active) == 5 and len(engine.requests) == 2)
    await asyncio.sleep(0.15)
    assert len(engine.requests) == 2
    release.set()
    for client in clients:
        assert (await client.answer()).status == 200


async def test_nothing_well_is_503_at_once(router: Harness) -> None:
    engine = await router.engine("r1")
    table = model(a=[engine])
    table["variants"][0]["endpoints"][0]["state"] = EndpointState.FAILED
    await router.table(table)
    answer = await router.ask()
    assert answer.status == 503
    assert answer.headers["retry-after"]


async def test_a_draining_engine_keeps_its_requests_and_gets_no_new_one(router: Harness) -> None:
    release = asyncio.Event()

    async def slow(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await answer_json(engine, request, writer)

    old, new = await router.engine("old", slow), await router.engine("new")
    await router.table(model(a=[old]))
    client = await router.client()
    client.send(post())
    await until(lambda: old.requests)
    table = model(a=[old, new])
    table["variants"][0]["endpoints"][0]["state"] = "Draining"
    await router.table(table)
    for _ in range(5):
        assert (await router.ask()).json()["engine"] == "new"
    await router.table(model(a=[new]))
    release.set()
    assert (await client.answer()).json()["engine"] == "old"
    assert sum(router.hub.counters.cells) == 0


async def test_idle_engines_are_checked() -> None:
    async with harness(health_interval=0.05) as checked:
        gone, good = await checked.engine("gone"), await checked.engine("good")
        await gone.stop()
        await checked.table(model(a=[gone, good]))
        await until(lambda: checked.worker.table.models["m"].variants["a"].stats.ejections == 1)
        assert not good.requests or good.requests[0].line == "GET /health HTTP/1.1"
        for _ in range(10):
            assert (await checked.ask()).json()["engine"] == "good"
        assert (await checked.stats()).retries == 0


@pytest.mark.parametrize(
    "answer", [b"x" * 200_000, b"", b"HTTP/1.1 ", b"\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n"]
)
async def test_no_answer_to_a_health_check_ends_them(answer: bytes) -> None:
    async def sick(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with harness(health_interval=0.01) as router:
        one, two = await router.engine("r1", sick), await router.engine("r2")
        await router.table(model(a=[one, two]))
        refs = router.worker.table.models["m"].variants["a"].endpoints
        await until(lambda: refs[0].limit == 0)
        seen = len(two.requests)
        await until(lambda: len(two.requests) > seen + 2)


async def test_a_model_that_is_removed_answers_who_waits_for_it(router: Harness) -> None:
    engine = await router.engine("r1")
    table = model(a=[engine])
    table["variants"][0]["endpoints"][0]["state"] = "Starting"
    await router.table(table)
    client = await router.client()
    client.send(post())
    await until(lambda: router.worker.dispatcher.waiting.number == 1)
    await router.table(model("other", a=[engine]))
    answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert router.worker.dispatcher.waiting.number == 0
    assert not any(router.hub.counters.cells)


async def test_a_model_that_comes_back_serves_who_waits_for_it(router: Harness) -> None:
    """Removed and added again, perhaps within one update: its queue and its counts are of the new one."""
    engine = await router.engine("r1")
    table = model(a=[engine])
    table["variants"][0]["endpoints"][0]["state"] = "Starting"
    for _ in range(4):
        await router.table(table)
        first = await router.client()
        first.send(post())
        await until(lambda: router.worker.dispatcher.waiting.number == 1)
        await router.table()
        assert (await first.answer()).status == 404
        await router.table(table)
        second = await router.client()
        second.send(post())
        await until(lambda: router.worker.dispatcher.waiting.number == 1)
        await router.table({**table, "variants": model(a=[engine])["variants"]})
        assert (await second.answer()).status == 200
        assert not any(router.hub.counters.cells)


async def test_a_variant_that_is_removed_answers_who_waits_for_it(router: Harness) -> None:
    engine = await router.engine("r1")
    table = model(a=[engine], b=[engine])
    for variant in table["variants"]:
        variant["endpoints"] = [{"id": "r1", "url": engine.url, "state": "Starting"}]
    await router.table(table)
    client = await router.client()
    client.send(post(model="m:b"))
    await until(lambda: router.worker.dispatcher.waiting.number == 1)
    await router.table({**table, "variants": table["variants"][:1]})
    answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (404, "variant_not_found")
    assert not any(router.hub.counters.cells)


async def test_who_is_cut_off_at_the_end_is_told() -> None:
    async with harness(drain_timeout=0.2) as router:
        streaming, silent = await router.engine("streams"), await router.engine("silent", hang)

        async def begins(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            writer.write(SSE_HEAD + chunk(event({"n": 1})))
            await asyncio.Event().wait()

        streaming.handler = begins
        waits = model("waits", a=[silent])
        waits["variants"][0]["endpoints"][0]["state"] = "Starting"
        await router.table(model("streams", a=[streaming]), model("silent", a=[silent]), waits)
        clients = {}
        for name in ("streams", "silent", "waits"):
            client = clients[name] = await router.client()
            client.send(post(model=name, stream=True))
        await until(lambda: len(router.worker.active) == 3)
        assert (await clients["streams"].head())[0] == 200
        await router.worker.drain(router._server)
        for name in ("silent", "waits"):
            answer = await clients[name].answer()
            assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        body, complete = await clients["streams"].chunks()
        assert not complete
        assert b"shutting down" in body
        assert not router.worker.active
        assert not any(router.hub.counters.cells)
        await asyncio.wait_for(silent.closed.wait(), 5)
