"""Streams: passed on as they come, slowed by a slow reader, ended by a client that leaves."""

from __future__ import annotations

import asyncio
import json
import socket

from tests.unit.router.harness import (
    SSE_HEAD,
    Engine,
    Harness,
    Received,
    chunk,
    event,
    hang,
    harness,
    model,
    post,
    stream,
    until,
)


async def test_events_pass_as_they_come(router: Harness) -> None:
    step = asyncio.Event()

    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + chunk(event({"n": 1})))
        await step.wait()
        writer.write(chunk(event({"n": 2})) + chunk(event("[DONE]")) + b"0\r\n\r\n")

    engine = await router.engine("r1", handler)
    await router.table(model(bf16=[engine]))
    client = await router.client()
    client.send(post(stream=True))
    status, headers = await client.head()
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-modelfleet-replica"] == "r1"
    assert await client.reader.readuntil(b"\n\n\r\n") == chunk(event({"n": 1}))
    step.set()
    body, complete = await client.chunks()
    assert complete
    assert body == event({"n": 2}) + event("[DONE]")
    client.send(post())
    assert (await client.head())[0] == 200


async def test_events_in_any_framing_reach_the_client_whole(router: Harness) -> None:
    """The engine's chunks and packets may cut events anywhere."""
    text = event({"text": "ein Stück"}) + b": comment\r\n\r\n" + event({"n": 2}) + event("[DONE]")
    sizes = (1, 2, 3, 5, 8, 13, 1000)

    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        size, packet = request.json()["cut"]
        data = (
            SSE_HEAD + b"".join(chunk(text[i : i + size]) for i in range(0, len(text), size)) + b"0\r\n\r\n"
        )
        for start in range(0, len(data), packet):
            writer.write(data[start : start + packet])
            await asyncio.sleep(0)

    await router.table(model(bf16=[await router.engine("r1", handler)]))
    client = await router.client()
    for size in sizes:
        for packet in sizes:
            client.send(post(stream=True, cut=[size, packet]))
            answer = await client.answer()
            assert answer.complete
            assert answer.body == text


async def test_old_clients_and_old_engines(router: Harness) -> None:
    async def until_close(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        kind = b"text/event-stream" if request.json().get("stream") else b"text/plain"
        writer.write(
            b"HTTP/1.0 200 OK\r\ncontent-type: " + kind + b"\r\n\r\n" + event({"n": 1}) + event("[DONE]")
        )
        await writer.drain()
        writer.close()

    old, new = await router.engine("old", until_close), await router.engine("new", stream({"n": 1}))
    await router.table(model("old", a=[old]), model("new", a=[new]))
    expected = event({"n": 1}) + event("[DONE]")
    for fields in ({"stream": True}, {}):
        answer = await router.ask(model="old", **fields)
        assert answer.complete
        assert answer.body == expected
    for name in ("old", "new"):
        data = post(model=name, stream=True).replace(b"HTTP/1.1", b"HTTP/1.0")
        answer = await router.ask(data)
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.body == expected


async def test_client_that_leaves_ends_a_silent_prefill_at_once(router: Harness) -> None:
    engine = await router.engine("r1", hang)
    await router.table(model(bf16=[engine]))
    client = await router.client()
    client.send(post())
    await until(lambda: engine.requests)
    assert router.hub.in_flight() == [("m", "bf16", 1)]
    started = asyncio.get_running_loop().time()
    await client.close()
    await asyncio.wait_for(engine.closed.wait(), 5)
    assert asyncio.get_running_loop().time() - started < 0.5
    await until(lambda: router.hub.in_flight() == [("m", "bf16", 0)])
    assert (await router.stats()).statuses == {499: 1}


async def test_client_that_leaves_a_stream_ends_it(router: Harness) -> None:
    engine = await router.engine("r1", stream(*range(100_000), pause=0.005))
    await router.table(model(bf16=[engine]))
    client = await router.client()
    client.send(post(stream=True))
    await client.reader.readuntil(b"\n\n\r\n")
    await client.close()
    await asyncio.wait_for(engine.closed.wait(), 5)


async def test_slow_reader_slows_the_engine_and_fills_no_memory(router: Harness) -> None:
    total = 64 * 1024 * 1024
    piece = event({"text": "x" * 60_000})
    written = 0

    async def flood(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(SSE_HEAD)
        while written < total:
            writer.write(chunk(piece))
            await writer.drain()
            written += len(piece)
        writer.write(b"0\r\n\r\n")

    await router.table(model(bf16=[await router.engine("r1", flood)]))
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", router.port))
    await loop.sock_sendall(sock, post(stream=True))
    previous = -1
    while written != previous:
        previous = written
        await asyncio.sleep(0.2)
    assert written < 16 * 1024 * 1024  # kernel buffers, both sides
    (connection,) = router.worker.clients
    assert connection.transport.get_write_buffer_size() < 1024 * 1024
    received = 0
    while data := await asyncio.wait_for(loop.sock_recv(sock, 1 << 20), 10):
        received += len(data)
        if data.endswith(b"\r\n0\r\n\r\n"):
            break
    assert received > total
    sock.close()


async def test_engine_that_dies_in_a_stream_is_not_taken_for_its_end() -> None:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        half = chunk(event({"n": 2}))[:-8]
        writer.write(SSE_HEAD + chunk(event({"n": 1})) + half)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with harness(continue_streams=False) as router:
        await router.table(model(bf16=[await router.engine("r1", handler)]))
        answer = await router.ask(stream=True)
        assert not answer.complete
        first, error, rest = answer.body.split(b"\n\n")
        assert first == b'data: {"n": 1}'
        assert "r1" in json.loads(error.removeprefix(b"data: "))["error"]["message"]
        assert rest == b""
        answer = await router.ask(post("/v1/messages", stream=True))
        assert b"event: error\n" in answer.body


async def test_engine_that_dies_in_a_sized_answer(router: Harness) -> None:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    await router.table(model(bf16=[await router.engine("r1", handler)]))
    client = await router.client()
    client.send(post())
    await client.head()
    assert await client.reader.read() == b"half"


async def test_websocket_passes_through(router: Harness) -> None:
    async def handler(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-accept: k\r\n\r\nhello"
        )
        await asyncio.sleep(0.05)
        writer.write(b"\x81\x02hi")
        await asyncio.sleep(10)

    engine = await router.engine("r1", handler)
    await router.table(model(bf16=[engine]))
    client = await router.client()
    client.send(
        b"GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: abc\r\nsec-websocket-version: 13\r\n\r\n\x81\x03abc"
    )
    status, headers = await client.head()
    assert status == 101
    assert headers["upgrade"] == "websocket"
    assert headers["sec-websocket-accept"] == "k"
    assert await client.reader.readexactly(9) == b"hello\x81\x02hi"
    assert engine.requests[0].headers["sec-websocket-key"] == "abc"
    assert engine.requests[0].headers["upgrade"] == "websocket"
    client.send(b"more")
    await until(lambda: engine.extra == b"\x81\x03abcmore")
    await client.close()
    await asyncio.wait_for(engine.closed.wait(), 5)
    assert (await router.ask(b"GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\n\r\n")).status == 426
