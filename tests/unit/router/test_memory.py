"""What is over goes at once: a router's collector hardly ever looks, so cycles would be a leak."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest
from tests.unit.router.harness import (
    SSE_HEAD,
    Answer,
    Engine,
    Harness,
    Received,
    answer_json,
    chunk,
    die,
    event,
    hang,
    model,
    post,
    stream,
)

ROUNDS = 12
SLACK = 4
"""Objects of a kind that may be on their way, or kept for the next: idle connections, the last heads."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _held() -> Counter[str]:
    """The router's objects that are alive, by kind."""
    found = (type(thing) for thing in gc.get_objects())
    return Counter(
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in found
        if str(kind.__module__).startswith("modelfleet_serving.router")
    )


def _delta(text: str) -> dict[str, object]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


async def _speak_and_die(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(SSE_HEAD + chunk(event(_delta("one"))) + chunk(event(_delta("two"))))
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def _ask(router: Harness, request: bytes) -> Answer:
    client = await router.client()
    client.send(request)
    answer = await client.answer()
    await client.close()
    return answer


async def answers(router: Harness) -> None:
    engine = await router.engine("plain", answer_json)
    await router.table(model(a=[engine]))
    assert (await _ask(router, post())).status == 200


async def streams(router: Harness) -> None:
    engine = await router.engine("stream", stream(*map(_delta, "abc")))
    await router.table(model(a=[engine]))
    assert (await _ask(router, post(stream=True))).complete


async def clients_leave(router: Harness) -> None:
    begun = asyncio.Event()

    async def begin(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        begun.set()
        await hang(engine, request, writer)

    engine = await router.engine("hang", begin)
    await router.table(model(a=[engine]))
    client = await router.client()
    client.send(post(stream=True))
    async with asyncio.timeout(10):
        await begun.wait()
        await client.close()
        await engine.closed.wait()


async def engines_die(router: Harness) -> None:
    engines = [await router.engine(f"die-{number}", die) for number in range(2)]
    await router.table(model(a=engines))
    assert (await _ask(router, post())).status >= 500


async def engines_refuse(router: Harness) -> None:
    engine = await router.engine("gone", answer_json)
    await engine.stop()
    await router.table(model(a=[engine]))
    assert (await _ask(router, post())).status >= 500


async def streams_go_on(router: Harness) -> None:
    engines = [await router.engine(f"cut-{number}", _speak_and_die) for number in range(2)]
    await router.table(model(a=engines))
    await _ask(router, post(stream=True))


async def models_come_and_go(router: Harness) -> None:
    engine = await router.engine("plain", answer_json)
    await router.table(model(a=[engine]))
    assert (await _ask(router, post())).status == 200
    names = [f"other-{number}" for number in range(5)]
    await router.table(*({**model(a=[engine], b=[engine]), "name": name} for name in names))
    for name in names:
        assert (await _ask(router, post(body={"model": f"{name}:a", "messages": []}))).status == 200
    assert (await _ask(router, post())).status == 404


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "happens",
    [answers, streams, clients_leave, engines_die, engines_refuse, streams_go_on, models_come_and_go],
)
async def test_nothing_waits_for_the_collector(
    router: Harness, happens: Callable[[Harness], Awaitable[None]]
) -> None:
    for _ in range(2):
        await happens(router)
        await router.table()
    await asyncio.sleep(0.05)
    before = _held()
    for _ in range(ROUNDS):
        await happens(router)
        await router.table()
    more: dict[str, int] = {}
    for _ in range(20):
        await asyncio.sleep(0.05)  # what was closed last is told so by the event loop
        more = {kind: count - before[kind] for kind, count in _held().items()}
        more = {kind: count for kind, count in more.items() if count > SLACK}
        if not more:
            break
    assert not more
