"""HTTP/1.1 towards clients: complete, strict, and safe against smuggling and slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import gzip

import pytest
from tests.unit.router.harness import (
    Engine,
    Harness,
    Received,
    answer_json,
    hang,
    harness,
    model,
    post,
    until,
)

BODY = b'{"model":"m"}'
START = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = START + b"host: x\r\n"


def _chunked(*chunks: bytes, extra: bytes = b"", trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in chunks)
    return HOST + b"transfer-encoding: chunked\r\n" + extra + b"\r\n" + body + b"0\r\n" + trailers + b"\r\n"


async def _ready(router: Harness) -> None:
    await router.table(model(bf16=[await router.engine("r1")]))


# Each of these has been a way to smuggle a request past some proxy, or breaks the protocol outright.
MALFORMED = {
    "length and chunked": HOST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": HOST + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": HOST + b"content-length: 13\r\ncontent-length: 14\r\n\r\n" + BODY,
    "equal lengths": HOST + b"content-length: 13\r\ncontent-length: 13\r\n\r\n" + BODY,
    "length list": HOST + b"content-length: 13, 13\r\n\r\n" + BODY,
    "signed length": HOST + b"content-length: +13\r\n\r\n" + BODY,
    "hexadecimal length": HOST + b"content-length: 0xd\r\n\r\n" + BODY,
    "huge length": HOST + b"content-length: 99999999999999999999\r\n\r\n",
    "empty length": HOST + b"content-length:\r\n\r\n",
    "other coding": HOST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": HOST + b"transfer-encoding: identity\r\n\r\n",
    "xchunked": HOST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding twice": HOST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": HOST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded header": HOST + b"x-a: b\r\n c\r\ncontent-length: 13\r\n\r\n" + BODY,
    "folded coding": HOST + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare LF": HOST + b"x-a: b\ncontent-length: 13\r\n\r\n" + BODY,
    "bare LF throughout": HOST.replace(b"\r\n", b"\n") + b"content-length: 13\n\n" + BODY,
    "bare CR": HOST + b"x-a: b\rcontent-length: 13\r\n\r\n" + BODY,
    "space before colon": HOST + b"content-length : 13\r\n\r\n" + BODY,
    "no colon": HOST + b"nonsense\r\n\r\n",
    "NUL in a value": HOST + b"x-a: b\x00c\r\n\r\n",
    "control character in a value": HOST + b"x-a: b\x01c\r\n\r\n",
    "no host": START + b"content-length: 13\r\n\r\n" + BODY,
    "two hosts": HOST + b"host: y\r\ncontent-length: 13\r\n\r\n" + BODY,
    "two request ids": HOST + b"x-request-id: a\r\nx-request-id: b\r\ncontent-length: 13\r\n\r\n" + BODY,
    "chunk size 0x3": HOST + b"transfer-encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "negative chunk": HOST + b"transfer-encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
    "chunk size with space": HOST + b"transfer-encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n",
    "huge chunk": HOST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc",
    "chunk without end": HOST + b"transfer-encoding: chunked\r\n\r\n3\r\nabcX0\r\n\r\n",
    "LF after chunk size": HOST + b"transfer-encoding: chunked\r\n\r\n3\nabc\n0\n\n",
    "length in trailers": _chunked(BODY, trailers=b"content-length: 4\r\n"),
    "unknown method": HOST.replace(b"POST", b"FOO") + b"\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "tab in request line": HOST.replace(b" ", b"\t", 1) + b"\r\n",
    "non-ASCII target": HOST.replace(b"/v1", b"/\xff1") + b"\r\n",
    "authority as target": HOST.replace(b"/v1/chat/completions", b"ftp://x/y") + b"\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_requests_are_400_and_nothing_behind_them_is_read(
    router: Harness, data: bytes
) -> None:
    await _ready(router)
    client = await router.client()
    client.send(data + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = await client.answer()
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["connection"] == "close"
    assert await client.closed()
    assert not router.engines[0].requests


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9"])
async def test_other_versions_are_refused(router: Harness, version: bytes) -> None:
    answer = await router.ask(HOST.replace(b"HTTP/1.1", version) + b"content-length: 13\r\n\r\n" + BODY)
    assert answer.status == 505


async def test_chunked_bodies_reach_the_engine_sized(router: Harness) -> None:
    await _ready(router)
    data = _chunked(BODY[:5], BODY[5:], extra=b"trailer: x-t\r\n", trailers=b"x-t: 1\r\n")
    assert (await router.ask(data)).status == 200
    received = router.engines[0].requests[0]
    assert received.body == BODY
    assert received.headers["content-length"] == "13"
    assert not {"transfer-encoding", "trailer", "x-t"} & set(received.headers)


async def test_pipelined_requests_are_answered_in_order(router: Harness) -> None:
    await _ready(router)
    client = await router.client()
    health = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    client.send(post() + health + post(model="nope") + _chunked(BODY) + health)
    assert [(await client.answer()).status for _ in range(5)] == [200, 200, 404, 200, 200]
    client.send(b"".join(post(headers={"x-request-id": f"n{n}"}) for n in range(300)))
    assert [(await client.answer()).headers["x-request-id"] for _ in range(300)] == [
        f"n{n}" for n in range(300)
    ]


async def test_answers_before_a_malformed_request_still_come(router: Harness) -> None:
    await _ready(router)
    client = await router.client()
    client.send(post() + post() + b"nonsense\r\n\r\n")
    assert [(await client.answer()).status for _ in range(3)] == [200, 200, 400]
    assert await client.closed()


async def test_any_split_of_the_bytes_gives_the_same_answer(router: Harness) -> None:
    await _ready(router)
    data = post() + _chunked(BODY[:5], BODY[5:])
    for step in (1, 2, 3, 7, 50):
        client = await router.client()
        for start in range(0, len(data), step):
            client.send(data[start : start + step])
            await asyncio.sleep(0)
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
    assert {request.body for request in router.engines[0].requests[1::2]} == {BODY}


async def test_expect_continue(router: Harness) -> None:
    await _ready(router)
    client = await router.client()
    client.send(HOST + b"expect: 100-continue\r\ncontent-length: 13\r\n\r\n")
    assert (await client.head())[0] == 100
    client.send(BODY)
    assert (await client.answer()).status == 200
    assert "expect" not in router.engines[0].requests[0].headers
    client.send(HOST + b"expect: magic\r\ncontent-length: 13\r\n\r\n")
    assert (await client.answer()).status == 417


async def test_http_1_0_clients(router: Harness) -> None:
    await _ready(router)
    client = await router.client()
    old = START.replace(b"1.1", b"1.0")
    client.send(old + b"connection: keep-alive\r\ncontent-length: 13\r\n\r\n" + BODY)
    answer = await client.answer()
    assert answer.headers["connection"] == "keep-alive"
    client.send(old + b"content-length: 13\r\n\r\n" + BODY)
    assert (await client.answer()).headers["connection"] == "close"
    assert await client.closed()


async def test_a_declined_upgrade_with_a_body_is_an_ordinary_request(router: Harness) -> None:
    """Java's HTTP client offers h2c with every request."""
    await _ready(router)
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAA"}
    client = await router.client()
    client.send(post(headers=offer) + post())
    assert [(await client.answer()).status for _ in range(2)] == [200, 200]
    received = router.engines[0].requests[0]
    assert not {"upgrade", "http2-settings", "connection"} & set(received.headers)
    request = post(headers=offer)
    client.send(request[:-5])
    await asyncio.sleep(0.01)
    client.send(request[-5:])
    assert (await client.answer()).status == 200


async def test_absolute_targets(router: Harness) -> None:
    await _ready(router)
    data = post().replace(b"POST /v1", b"POST http://router/v1")
    assert (await router.ask(data)).status == 200
    assert router.engines[0].requests[0].line.startswith("POST /v1/chat/completions ")


async def test_limits(router: Harness) -> None:
    async with harness(max_body_bytes=1000, max_header_bytes=2000) as small:
        await _ready(small)
        answer = await small.ask(post(body=b"x" * 1001))
        assert answer.status == 413
        assert answer.error["code"] == "body_too_large"
        assert (await small.ask(_chunked(b"x" * 600, b"x" * 600))).status == 413
        assert (await small.ask(post(headers={"x-a": "b" * 3000}))).status == 431
        client = await small.client()
        for _ in range(20):
            client.send(b"x" * 1000 if _ else HOST + b"x-a: ")
            await asyncio.sleep(0)
        assert (await client.answer()).status == 431
        answer = await small.ask(_chunked(BODY, trailers=b"".join(b"x-%d: y\r\n" % n for n in range(200))))
        assert answer.status == 431


async def test_request_bodies_share_a_limit_and_give_it_back() -> None:
    async with harness(max_buffered_bytes=2000) as router:
        await _ready(router)
        worker = router.worker
        leaving, slow = await router.client(), await router.client()
        for client in (leaving, slow):
            client.send(HOST + b"content-length: %d\r\n\r\n" % 950 + b" " * 900)
        await until(lambda: worker.buffered == 1800)
        assert (await router.ask(post())).status == 200
        for request in (post(body=b"x" * 300), _chunked(b"x" * 150, b"x" * 150)):
            answer = await router.ask(request)
            assert answer.status == 503
            assert answer.error["code"] == "overloaded"
            assert "retry-after" in answer.headers
        await leaving.close()
        await until(lambda: worker.buffered == 900)
        slow.send(BODY.rjust(50))
        assert (await slow.answer()).status == 200
        await until(lambda: worker.buffered == 0)
        slow.send(post() * 2)
        assert [(await slow.answer()).status for _ in range(2)] == [200, 200]
        await until(lambda: worker.buffered == 0)


async def test_slow_clients_are_let_go() -> None:
    async with harness(header_timeout=0.2, body_timeout=0.2, keepalive_timeout=0.2) as router:
        await _ready(router)
        silent, head, body, idle = [await router.client() for _ in range(4)]
        head.send(HOST)
        body.send(HOST + b"content-length: 13\r\n\r\n")
        idle.send(post())
        assert (await idle.answer()).status == 200
        assert (await head.answer()).status == 408
        assert (await body.answer()).status == 408
        assert await silent.closed()
        assert await idle.closed()
        await until(lambda: len(router.worker.clients) <= 2)


async def test_cors_only_where_configured(router: Harness) -> None:
    await _ready(router)
    assert (
        "access-control-allow-origin" not in (await router.ask(post(headers={"origin": "http://a"}))).headers
    )
    preflight = (
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: http://a\r\n"
        b"access-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n\r\n"
    )
    async with harness(cors_origins="http://a, http://b") as browser:
        await _ready(browser)
        answer = await browser.ask(preflight)
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == "http://a"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization"
        answer = await browser.ask(post(headers={"origin": "http://b"}))
        assert answer.headers["access-control-allow-origin"] == "http://b"
        assert answer.headers["vary"] == "origin"
        answer = await browser.ask(post(headers={"origin": "http://evil"}))
        assert "access-control-allow-origin" not in answer.headers
        answer = await browser.ask(post(model="nope", headers={"origin": "http://b"}))
        assert answer.headers["access-control-allow-origin"] == "http://b"


async def test_connections_beyond_the_bound_are_told_so_and_take_no_place() -> None:
    async with harness(max_connections=2) as router:
        await _ready(router)
        kept = [await router.client() for _ in range(2)]
        for client in kept:
            client.send(post())
            assert (await client.answer()).status == 200
        refused = [await router.client() for _ in range(5)]
        for client in refused:
            answer = await client.answer()
            assert answer.status == 503
            assert answer.error["code"] == "too_many_connections"
            assert answer.headers["connection"] == "close"
            assert "retry-after" in answer.headers
        await kept[0].close()
        # The refused ones still linger, and must not keep others out.
        await until(lambda: len(router.worker.clients) <= 1)
        assert (await router.ask()).status == 200
        kept[1].send(post())
        assert (await kept[1].answer()).status == 200


@pytest.mark.parametrize("where", ["trailer", "extension", "chunks"])
async def test_framing_without_content_is_bounded(router: Harness, where: str) -> None:
    """What the parser skips or gathers is in no body's size."""
    await _ready(router)
    client = await router.client()
    head = HOST + b"transfer-encoding: chunked\r\n\r\n"
    start = {"trailer": head + b"0\r\nx-t: ", "extension": head + b"5;a=", "chunks": head}[where]
    more = b"1;a=" + b"b" * 1000 + b"\r\nx\r\n" if where == "chunks" else b"a" * 1000
    client.send(start)
    with contextlib.suppress(ConnectionError):
        for _ in range(4000):
            client.send(more)
            await asyncio.sleep(0)
            if client.reader.at_eof() or client.reader._buffer:  # type: ignore[attr-defined]
                break
        else:
            pytest.fail("it took everything")
    assert (await client.answer()).status in (400, 431)


async def test_a_head_in_pieces_does_not_count_as_body() -> None:
    async with harness(max_body_bytes=13) as router:
        await _ready(router)
        client = await router.client()
        data = HOST + b"content-length: 13\r\n\r\n" + BODY
        for start in range(0, len(data), 5):
            client.send(data[start : start + 5])
            await asyncio.sleep(0)
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/v1/models", 200),
        ("HEAD", "/healthz", 200),
        ("HEAD", "/v1/chat/completions", 405),
        ("HEAD", "/nothing", 404),
        ("OPTIONS", "*", 204),
        ("OPTIONS", "/v1/chat/completions", 204),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/m", 405),
        ("TRACE", "/v1/models", 405),
        ("CONNECT", "example.org:443", 400),
        ("GET", "/v1/realtime?model=m", 426),
        ("GET", "http://router/v1/models", 200),
        ("GET", "HTTP://router/v1/models", 200),
        ("GET", "http://router", 404),
        ("GET", "*", 404),
    ],
)
async def test_methods_and_targets(router: Harness, method: str, path: str, status: int) -> None:
    """Each leaves the connection in step, but for the refused target."""
    await _ready(router)
    client = await router.client()
    client.send(f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() + post())
    answer = await client.answer(head_only=method == "HEAD")
    assert answer.status == status
    if status == 405:
        assert answer.headers["allow"]
    if status != 400:
        assert (await client.answer()).status == 200


async def test_an_http_2_preface_is_refused(router: Harness) -> None:
    client = await router.client()
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert (await client.answer()).status in (400, 505)
    assert await client.closed()


async def test_a_hundred_pipelined_requests_of_many_kinds(router: Harness) -> None:
    await _ready(router)
    client = await router.client()
    kinds = [
        (post(), 200, False),
        (_chunked(BODY), 200, False),
        (b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", 200, True),
        (post(body=b"{"), 400, False),
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", 204, False),
        (post(headers={"expect": "100-continue"}), 200, False),
    ]
    client.send(b"".join(kinds[number % len(kinds)][0] for number in range(100)))
    for number in range(100):
        _, status, head_only = kinds[number % len(kinds)]
        answer = await client.answer(head_only=head_only)
        while answer.status == 100:
            answer = await client.answer()
        assert answer.status == status, number


async def test_a_pipelined_expectation_is_met_in_its_turn(router: Harness) -> None:
    """The 100 must neither stand inside the answer before it nor be left out."""
    await _ready(router)
    go = asyncio.Event()

    async def slow(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await answer_json(engine, request, writer)

    router.engines[0].handler = slow
    client = await router.client()
    client.send(post() + HOST + b"expect: 100-continue\r\ncontent-length: 13\r\n\r\n")
    await until(lambda: router.engines[0].requests)
    go.set()
    assert (await client.answer()).status == 200
    assert (await client.head())[0] == 100
    client.send(BODY)
    assert (await client.answer()).status == 200


async def test_compressed_bodies_are_refused_by_name(router: Harness) -> None:
    await _ready(router)
    body = gzip.compress(BODY)
    answer = await router.ask(post(body=body, headers={"content-encoding": "gzip"}))
    assert answer.status == 415
    assert "gzip" in answer.error["message"]
    assert (await router.ask(post(headers={"content-encoding": "identity"}))).status == 200


async def test_a_client_that_only_stops_sending_is_taken_for_gone(router: Harness) -> None:
    engine = await router.engine("r1", hang)
    await router.table(model(a=[engine]))
    client = await router.client()
    client.send(post())
    await until(lambda: engine.requests)
    client.writer.write_eof()
    await asyncio.wait_for(engine.closed.wait(), 5)


async def test_a_slow_next_request_never_interrupts_the_answer_before_it() -> None:
    async with harness(header_timeout=0.1, body_timeout=0.1) as router:
        await _ready(router)
        go = asyncio.Event()

        async def slow(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
            await go.wait()
            await answer_json(engine, request, writer)

        router.engines[0].handler = slow
        for start in (HOST + b"content-length: 13\r\n\r\n{", HOST + b"x-a: "):
            go.clear()
            client = await router.client()
            client.send(post() + start)
            await until(lambda: router.worker.active)
            await asyncio.sleep(0.25)
            go.set()
            assert (await client.answer()).status == 200
            assert (await client.answer()).status == 408


async def test_a_next_request_is_bounded_while_one_runs(router: Harness) -> None:
    engine = await router.engine("r1", hang)
    await router.table(model(a=[engine]))
    client = await router.client()
    client.send(post() + HOST + b"x-a: ")
    await until(lambda: engine.requests)
    with contextlib.suppress(ConnectionError):
        for _ in range(3000):
            client.send(b"b" * 1000)
            await asyncio.sleep(0)
    await until(lambda: all(one.request is None for one in router.worker.clients))


async def test_caches_keep_origins_apart() -> None:
    async with harness(cors_origins="http://a") as router:
        await _ready(router)
        for headers in ({}, {"origin": "http://b"}, {"origin": "http://a"}):
            answer = await router.ask(post(headers=headers))
            assert answer.headers["vary"] == "origin"
            assert ("access-control-allow-origin" in answer.headers) == (headers.get("origin") == "http://a")
        preflight = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: http://b\r\n\r\n"
        assert "access-control-allow-methods" not in (await router.ask(preflight)).headers
    async with harness(cors_origins="*") as router:
        await _ready(router)
        answer = await router.ask(post(headers={"origin": "http://b"}))
        assert answer.headers["access-control-allow-origin"] == "*"


async def test_health_by_the_name_that_engines_have(router: Harness) -> None:
    assert (await router.ask(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200
