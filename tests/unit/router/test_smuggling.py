"""Nothing of one request reaches an engine, or a client, as part of another one."""

from __future__ import annotations

import asyncio
import socket

import pytest
from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Handler,
    Harness,
    Received,
    chunk,
    event,
    harness,
    model,
    post,
    until,
)

HIDDEN = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
UPGRADE = b"connection: upgrade\r\nupgrade: websocket\r\n"
REALTIME = b"GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\n" + UPGRADE


async def _ready(router: Harness) -> Engine:
    engine = await router.engine("r1")
    await router.table(model(a=[engine]))
    return engine


@pytest.mark.parametrize("websocket", [b"websocket", b"WebSocket", b"h2c", b"websocket, h2c"])
async def test_a_body_behind_an_upgrade_offer_stays_a_body(router: Harness, websocket: bytes) -> None:
    """Only a realtime path is upgraded: elsewhere what follows the head is this request's body."""
    engine = await _ready(router)
    client = await router.client()
    body = b'{"model":"m","x":"' + HIDDEN.replace(b"\r\n", b"  ").replace(b"{}", b"") + b'"}'
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: "
        + websocket
        + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    client.send(head + body[:5])
    await asyncio.sleep(0.01)
    client.send(body[5:] + post())
    assert [(await client.answer()).status for _ in range(2)] == [200, 200]
    assert engine.requests[0].body == body
    assert "upgrade" not in engine.requests[0].headers
    assert not engine.extra


async def test_bytes_behind_an_upgrade_wait_for_the_engines_word(router: Harness) -> None:
    """An engine that declines would read them as a request, unchecked, and answer it to somebody else."""
    engine = await _ready(router)
    go = asyncio.Event()

    async def decline(one: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno")

    engine.handler = decline
    client = await router.client()
    client.send(REALTIME + b"\r\n" + HIDDEN)
    await until(lambda: engine.requests)
    client.send(HIDDEN)
    await asyncio.sleep(0.02)
    go.set()
    assert (await client.answer()).status == 403
    assert await client.closed()
    await client.close()
    assert not engine.extra
    assert len(engine.requests) == 1
    await until(lambda: not router.worker.clients)
    # Nor is the connection used again, whatever may be in it.
    ref = next(iter(router.worker.table.models.values())).variants["a"].endpoints[0]
    assert not ref.idle


async def test_early_websocket_frames_reach_the_engine_once_it_has_switched(router: Harness) -> None:
    engine = await _ready(router)

    async def switch(one: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n" + UPGRADE + b"\r\nhello")
        await asyncio.Event().wait()

    engine.handler = switch
    client = await router.client()
    client.send(REALTIME + b"\r\nfirst ")
    await until(lambda: engine.requests)
    client.send(b"second")
    assert (await client.head())[0] == 101
    assert await client.reader.readexactly(5) == b"hello"
    await until(lambda: engine.extra == b"first second")


@pytest.mark.parametrize(
    "framing",
    [b"content-length: 5\r\n\r\nhello", b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
)
async def test_an_upgrade_has_no_body(router: Harness, framing: bytes) -> None:
    engine = await _ready(router)
    client = await router.client()
    client.send(REALTIME + framing)
    assert (await client.answer()).status == 400
    assert not engine.requests


async def test_an_engine_that_switches_unasked_is_refused(router: Harness) -> None:
    """Else it would get the client's next request raw, whoever checked it."""
    engine = await _ready(router)

    async def switch(one: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n" + UPGRADE + b"\r\n")

    engine.handler = switch
    answer = await router.ask()
    assert answer.status == 502
    assert not router.worker.active


def raw(data: bytes, *, close: bool = False) -> Handler:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return handler


OK = b"HTTP/1.1 200 OK\r\n"
BROKEN = {
    "bare LF in a header": OK + b"x-a: b\nset-cookie: c\r\ncontent-length: 2\r\n\r\nok",
    "bare CR in a header": OK + b"x-a: b\rset-cookie: c\r\ncontent-length: 2\r\n\r\nok",
    "NUL in a header": OK + b"x-a: b\x00c\r\ncontent-length: 2\r\n\r\nok",
    "bare LF in the status line": b"HTTP/1.1 200 OK\nx-a: b\r\ncontent-length: 2\r\n\r\nok",
    "space before colon": OK + b"content-length : 2\r\n\r\nok",
    "tab before colon": OK + b"transfer-encoding\t: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "no name": OK + b": x\r\ncontent-length: 2\r\n\r\nok",
    "space in a name": OK + b"x a: x\r\ncontent-length: 2\r\n\r\nok",
    "folded header": OK + b"x-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok",
    "long status": b"HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok",
    "status 099": b"HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nok",
    "two lengths": OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nok",
    "length list": OK + b"content-length: 2, 2\r\n\r\nok",
    "signed length": OK + b"content-length: +2\r\n\r\nok",
    "length and chunked": OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "endless length": OK + b"content-length: " + b"9" * 5000 + b"\r\n\r\nok",
    "large length": OK + b"content-length: 99999999999999999999\r\n\r\nok",
    "coding twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip coding": OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "HTTP/2 frame": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\r\n\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
async def test_malformed_heads_of_engines_are_a_502(router: Harness, data: bytes) -> None:
    engine = await _ready(router)
    engine.handler = raw(data)
    answer = await router.ask()
    assert answer.status == 502
    assert answer.error["code"] == "engine_failed"
    engine.handler = raw(OK + b"content-length: 2\r\n\r\nok")
    assert (await router.ask()).body == b"ok"
    assert not any(router.hub.counters.cells)


CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BROKEN_BODIES = {
    "size with LF": CHUNKED + b"2;a\nb\r\nok\r\n0\r\n\r\n",
    "size with CR": CHUNKED + b"2;a\rb\r\nok\r\n0\r\n\r\n",
    "0x": CHUNKED + b"0x2\r\nok\r\n0\r\n\r\n",
    "signed": CHUNKED + b"+2\r\nok\r\n0\r\n\r\n",
    "underscore": CHUNKED + b"0_2\r\nok\r\n0\r\n\r\n",
    "no size": CHUNKED + b";x\r\nok\r\n0\r\n\r\n",
    "no end": CHUNKED + b"2\r\nokXX0\r\n\r\n",
    "trailer without colon": CHUNKED + b"2\r\nok\r\n0\r\nok\r\n0\r\n\r\n",
    "trailer with LF": CHUNKED + b"2\r\nok\r\n0\r\nx: y\nz: a\r\n\r\n",
    "folded trailer": CHUNKED + b"2\r\nok\r\n0\r\nx: y\r\n z\r\n\r\n",
    "size above 2^63": CHUNKED + b"ffffffffffffffff\r\nok",
}


@pytest.mark.parametrize("data", BROKEN_BODIES.values(), ids=BROKEN_BODIES.keys())
@pytest.mark.parametrize("step", [1000, 1])
async def test_malformed_chunks_of_engines_are_cut_off(router: Harness, data: bytes, step: int) -> None:
    engine = await _ready(router)

    async def drip(one: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), step):
            writer.write(data[start : start + step])
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)

    engine.handler = drip
    client = await router.client()
    client.send(post() + post())
    status, _ = await client.head()
    assert status == 200
    rest = await asyncio.wait_for(client.reader.read(), 5)
    assert b"HTTP/1.1" not in rest
    assert not rest.endswith(b"0\r\n\r\n") or (step == 1 and b"ok\r\n0\r\nok" in rest)


@pytest.mark.parametrize("informational", [b"100 Continue", b"102 Processing", b"103 Early Hints"])
async def test_informational_answers_are_not_the_answer(router: Harness, informational: bytes) -> None:
    engine = await _ready(router)
    hints = b"HTTP/1.1 " + informational + b"\r\nlink: </a>\r\n\r\n"
    engine.handler = raw(hints * 3 + OK + b"content-length: 2\r\n\r\nok")
    answer = await router.ask()
    assert (answer.status, answer.body) == (200, b"ok")
    assert "link" not in answer.headers


async def test_more_bytes_than_announced_are_dropped_with_the_connection(router: Harness) -> None:
    engine = await _ready(router)
    engine.handler = raw(OK + b"content-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
    for _ in range(3):
        assert (await router.ask()).body == b"ok"
    assert engine.connections == 3


async def test_an_answer_before_the_body_is_sent_reaches_the_client() -> None:
    """An engine that refuses a large body says so, and resets the connection, before it has read it."""
    async with harness() as router:
        head = OK.replace(b"200 OK", b"413 Too Large") + b"content-length: 2\r\nconnection: close\r\n\r\nno"

        async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            await writer.drain()
            writer.close()  # with unread bytes: the kernel resets it

        server = await asyncio.start_server(early, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            endpoints = [{"id": "r", "url": f"http://127.0.0.1:{port}"}]
            await router.table({"name": "m", "variants": [{"name": "a", "endpoints": endpoints}]})
            body = b'{"model":"m","pad":"' + b"x" * 8_000_000 + b'"}'
            answers = [await router.ask(post(body=body)) for _ in range(5)]
            assert [answer.status for answer in answers] == [413] * 5
        finally:
            server.close()


async def test_a_connection_that_still_carries_a_body_is_not_used_again(router: Harness) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        await router.table({"name": "m", "variants": [{"name": "a", "endpoints": [{"id": "r", "url": url}]}]})
        body = b'{"model":"m","pad":"' + b"x" * 30_000_000 + b'"}'
        asking = asyncio.create_task(router.ask(post(body=body)))
        engine, _ = await loop.sock_accept(listening)
        with engine:
            await loop.sock_recv(engine, 1000)
            await loop.sock_sendall(engine, OK + b"content-length: 2\r\n\r\nok")
            assert (await asking).status == 200
            assert not router.worker.table.models["m"].variants["a"].endpoints[0].idle


POSITIONS = SSE_HEAD + chunk(event({"n": 1})) + chunk(event("[DONE]")) + b"0\r\n\r\n"


@pytest.mark.parametrize("cut", range(0, len(POSITIONS), 7))
async def test_a_lost_engine_is_never_a_whole_answer(router: Harness, cut: int) -> None:
    """Wherever in the answer the connection closes."""
    engine = await _ready(router)
    engine.handler = raw(POSITIONS[:cut], close=True)
    answer = await router.ask(post(stream=True))
    if answer.status == 200:
        assert event("[DONE]") in answer.body or b'"error"' in answer.body
        assert not answer.complete or event("[DONE]") in answer.body or b'"error"' in answer.body
    else:
        assert answer.status == 502
    await until(lambda: not any(router.hub.counters.cells))


async def test_cross_origin_headers_are_the_routers_own() -> None:
    """vLLM answers every Origin with ``*``: twice, browsers refuse it; alone, nobody has configured it."""
    for origins, expected in (("", None), ("http://a", "http://a")):
        async with harness(cors_origins=origins) as router:
            engine = await _ready(router)
            engine.handler = raw(
                OK + b"access-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n"
                b"content-length: 2\r\n\r\nok"
            )
            client = await router.client()
            client.send(post(headers={"origin": "http://a"}))
            head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
            assert head.count(b"access-control-allow-origin") == (1 if expected else 0)
            assert b"credentials" not in head
            answer = await router.ask(post(headers={"origin": "http://b"}))
            assert answer.headers.get("vary", "origin") == "origin"
