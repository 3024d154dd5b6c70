"""Properties of the framing: whatever the split of the bytes, and whatever the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.router.harness import Engine, Received, harness, model, post, until

from modelfleet_serving.router.body import multipart_model, peek_json, replace_model
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.response import ChunkScanner, FramingError, ResponseHead, is_one_chunk

PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(
    PIECES,
    st.lists(st.integers(0, 10_000), max_size=12),
    st.sampled_from([b"", b"x: y\r\n"]),
    st.binary(max_size=5),
)
def test_chunked_bodies_are_followed_to_their_exact_end(
    pieces: list[bytes], cuts: list[int], trailers: bytes, behind: bytes
) -> None:
    body = (
        b"".join(b"%x;e=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        + b"0\r\n"
        + trailers
        + b"\r\n"
    )
    follow, read = ChunkScanner(), ChunkScanner()
    out: list[bytes] = []
    position = 0
    for part in _split(body + behind, cuts):
        end = follow.feed(part)
        assert read.feed(part, out) == end
        if end >= 0:
            assert position + end == len(body)
            break
        position += len(part)
    else:
        pytest.fail("the end was not seen")
    assert b"".join(out) == b"".join(pieces)


@given(
    st.binary(max_size=300) | st.integers(0, 5000).map(bytes), st.binary(max_size=3), st.binary(max_size=3)
)
def test_one_chunk_is_what_the_scanner_takes_for_one(content: bytes, before: bytes, behind: bytes) -> None:
    chunk = b"%x\r\n%b\r\n" % (len(content), content)
    assert is_one_chunk(chunk) == (0 < len(content) < 4096)
    data = before + chunk + behind
    if is_one_chunk(data):
        out: list[bytes] = []
        scanner = ChunkScanner()
        assert scanner.feed(data, out) == -1
        assert scanner.at_boundary
        assert len(out) == 1


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_no_bytes_break_the_scanner(data: bytes, cuts: list[int]) -> None:
    scanner = ChunkScanner()
    try:
        for part in _split(data, cuts):
            if scanner.feed(part, []) >= 0:
                break
    except FramingError:
        pass


@given(st.binary(max_size=300))
def test_no_bytes_break_the_head(data: bytes) -> None:
    try:
        head = ResponseHead(b"HTTP/1.1 200 OK\r\n" + data)
    except FramingError:
        return
    assert head.length < 0 or not head.chunked


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.just("model"), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.lists(st.tuples(st.text(max_size=8).filter(lambda key: key != "model"), JSON), max_size=5),
    st.lists(st.tuples(st.text(max_size=8).filter(lambda key: key != "model"), JSON), max_size=5),
    st.text(min_size=1, max_size=20),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_only_the_model_changes(
    before: list[tuple[str, object]],
    after: list[tuple[str, object]],
    name: str,
    ascii_only: bool,
    indent: int | None,
) -> None:
    members = [*before, ("model", name), *after]
    glue = ": " if indent else ":"
    text = ",".join(
        json.dumps(key, ensure_ascii=ascii_only)
        + glue
        + json.dumps(value, ensure_ascii=ascii_only, indent=indent)
        for key, value in members
    )
    try:
        body = f"{{{text}}}".encode()
    except UnicodeEncodeError:
        return  # lone surrogates can't be sent
    assert peek_json(body).model == name
    changed = replace_model(body, "other")
    assert json.loads(changed) == {**json.loads(body), "model": "other"}
    place = changed.index(b'"other"', len(json.dumps(dict(before))) // 4)
    assert len(changed) - len(body) == len(b'"other"') - len(
        json.dumps(name, ensure_ascii=ascii_only).encode()
    )
    assert place >= 0


def test_of_repeated_keys_the_last_one_counts() -> None:
    body = b'{"model":"a","x":{"model":"c"},"mo\\u0064el":"b"}'
    assert peek_json(body).model == "b"
    assert json.loads(replace_model(body, "z"))["model"] == "z"


def _refusal(read: Callable[[bytes], object], body: bytes) -> int | None:
    try:
        read(body)
    except RequestError as error:
        return error.status
    return None


@given(st.binary(max_size=300))
def test_any_body_is_a_request_or_a_400(data: bytes) -> None:
    for read in (peek_json, lambda body: multipart_model(body, b"multipart/form-data; boundary=b")):
        assert _refusal(read, data) in (None, 400)


@given(
    st.lists(
        st.sampled_from(
            [b"--b", b"--", b"\r\n", b"\r\n\r\n", b'content-disposition: form-data; name="model"', b"x"]
        )
    )
)
def test_any_form_is_a_name_or_a_400(parts: list[bytes]) -> None:
    body = b"".join(parts)
    assert _refusal(lambda body: multipart_model(body, b"multipart/form-data; boundary=b"), body) in (
        None,
        400,
    )


VALID = post() + post(body=b'{"model":"m"}', headers={"connection": "close"})
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, len(VALID) - 1),
        st.sampled_from([b"", b"\r", b"\n", b"\r\n", b":", b" ", b"\x00", b"\xff", b"0"]),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def fast_sweeps() -> Iterator[None]:
    """Time-outs are noticed ten times as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelfleet_serving.router.worker.SWEEP_SECONDS", 0.01)
        yield


@pytest.mark.usefixtures("fast_sweeps")
@settings(max_examples=40, deadline=None)
@given(MUTATIONS, st.lists(st.integers(0, 1000), max_size=4))
def test_mutated_requests_never_crash_or_desynchronise(
    mutations: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    """Every answer is whole, none is a 5xx, and the router lives on."""
    data = VALID
    for place, text in mutations:
        data = data[:place] + text + data[place + 1 :]

    async def run() -> list[int]:
        async with harness(header_timeout=0.05, body_timeout=0.05, keepalive_timeout=0.05) as router:
            await router.table(model(a=[await router.engine("r1")]))
            client = await router.client()
            for part in _split(data, cuts):
                client.send(part)
                await asyncio.sleep(0)
            statuses, partial = [], b""
            try:
                while True:
                    statuses.append((await client.answer()).status)
            except asyncio.IncompleteReadError as error:
                partial = error.partial
            except ConnectionError:
                pass
            assert not partial
            assert (await router.ask()).status == 200
            assert not any(router.hub.counters.cells)
            return statuses

    statuses = asyncio.run(run())
    # 505 is what a request of another HTTP version gets.
    assert all(status < 500 or status == 505 for status in statuses)


CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n"
ANSWER = (
    CHUNKED % (b"text/event-stream", b'12\r\ndata: {"n": 1}\n\n  \r\n'),
    CHUNKED % (b"text/plain", b"2\r\nok\r\n"),
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok",
)


@pytest.mark.usefixtures("fast_sweeps")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ANSWER), MUTATIONS, st.lists(st.integers(0, 200), max_size=3), st.booleans())
def test_mutated_answers_never_crash_or_desynchronise(
    answer: bytes, mutations: list[tuple[int, bytes]], cuts: list[int], ends: bool
) -> None:
    """However an engine answers: the client reads whole answers, the second one its own, or sees a cut."""
    for number, text in mutations:
        place = number % len(answer)
        answer = answer[:place] + text + answer[place + 1 :]

    async def odd(engine: Engine, request: Received, writer: asyncio.StreamWriter) -> None:
        for part in _split(answer, cuts):
            writer.write(part)
            await asyncio.sleep(0)
        if ends:
            await writer.drain()
            writer.close()

    async def run() -> None:
        async with harness(idle_timeout=0.3, first_byte_timeout=0.3, max_attempts=1) as router:
            await router.table(
                model(a=[await router.engine("odd", odd)]), model("good", a=[await router.engine("good")])
            )
            client = await router.client()
            client.send(post() + post(model="good"))
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                first = await client.answer()
                if first.complete:
                    second = await client.answer()
                    assert second.headers["x-modelfleet-replica"] == "good"
                    assert second.json()["engine"] == "good"
            assert (await router.ask(post(model="good"))).status == 200
            await until(lambda: not router.worker.active)
            assert not any(router.hub.counters.cells)

    asyncio.run(run())
