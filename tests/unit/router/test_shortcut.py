"""Shortcuts from an engine's socket to a client's: what passes, what doesn't, and that nothing is lost."""

from __future__ import annotations

import select
import socket
import struct
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfleet_serving.router.relay import frame
from modelfleet_serving.router.response import ChunkScanner

BOUNDS = (0.01, 0.1, 1.0)
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


class Way:
    """An engine's connection, a client's, and a shortcut between them."""

    def __init__(self, module: ModuleType, engine: Any, client: Any, *, most: int = 1 << 30) -> None:
        self.engine, self.source = engine
        self.sink, self.client = client
        self.counts = array("d", [0.0] * (len(BOUNDS) + 2))
        self.kept = module.Tape()
        self.shortcut = module.Shortcut(array("d", BOUNDS), self.counts, self.kept, most)
        self.epoll = select.epoll()
        self.epoll.register(self.source.fileno(), select.EPOLLIN)
        self._wait = module.wait_ready

    def open(self, last: float = 0.0) -> None:
        self.shortcut.open(self.source.fileno(), self.sink.fileno(), last)

    def serve(self) -> list[Any]:
        select.select([self.source], [], [], 5)
        found: list[Any] = self._wait(self.epoll.fileno(), 0.0)
        return found

    def send(self, data: bytes) -> list[Any]:
        """Sends as the engine; what the interpreter is told of it."""
        self.engine.sendall(data)
        found = self.serve()
        assert found[::2] == [self.source.fileno()] * (len(found) // 2)
        return found[1::2]

    def received(self) -> bytes:
        try:
            data: bytes = self.client.recv(1 << 20)
        except BlockingIOError:
            return b""
        return data


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    far.setblocking(False)
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@pytest.fixture
def way(compiled: ModuleType) -> Iterator[Way]:
    engine, client = pair(), pair()
    client[0].setblocking(False)
    way = Way(compiled, engine, client)
    with way.epoll, engine[0], engine[1], client[0], client[1]:
        yield way


def test_regular_chunks_pass_and_are_counted_and_kept(way: Way) -> None:
    way.open()
    one, two = frame(EVENT), frame(EVENT + EVENT) + frame(b": hello\n\n")
    assert way.send(one) == []
    assert way.received() == one
    assert way.send(two) == []
    assert way.received() == two
    assert bytes(way.kept) == one + two
    assert way.shortcut.is_open
    assert way.shortcut.pieces == 2
    # The first gap began at 0 of a clock that has run for longer than a second; the second one just now.
    assert way.counts[3] == 1
    assert sum(way.counts[:3]) == 1
    assert way.counts[4] == pytest.approx(way.shortcut.last, abs=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        frame(b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n'),
        frame(b'data: {"usage":null,"x":{"usage":{}}}\n\n'),
        frame(b'data: "usage"'[:-1] + b'"\n\n'),
        frame(EVENT) + b"0\r\n\r\n",
        b"0\r\n\r\n",
        frame(EVENT)[:-1],
        frame(b"data: x\n"),
        frame(b"data: x\r\n\r\n"),
        b"0" + frame(EVENT),
        frame(EVENT).upper(),
        b"8;a=b\r\ndata: \n\n\r\n",
        b"9\r\ndata: \n\n\r\n",
        b"7\r\ndata: \n\n\r\n",
        b"\r\n\n\n\r\n",
        b"-8\r\ndata: \n\n\r\n",
        frame(b"d" * 20_000 + b"\n\n"),
        b"HTTP/1.1 200 OK\r\n\n\r\n",
    ],
)
def test_what_is_not_regular_is_told_whole_and_ends_it(way: Way, data: bytes) -> None:
    way.open()
    told = way.send(data)
    assert told == [data]
    assert not way.shortcut.is_open
    assert way.received() == b""
    assert not way.kept
    assert way.shortcut.pieces == 0
    # From here on, all is as without it.
    assert way.send(frame(EVENT)) == [select.EPOLLIN]


def test_a_usage_of_null_tells_nothing(way: Way) -> None:
    way.open()
    data = frame(b'data: {"choices":[{"text":"a"}],"usage":null}\n\n')
    assert way.send(data) == []
    assert way.received() == data


chunk = st.one_of(
    st.sampled_from([EVENT, b": x\n\n", b'data: {"usage":null}\n\n', b'data: {"usage":{}}\n\n']).map(frame),
    st.binary(max_size=40).map(lambda data: frame(data) if data else b"0\r\n\r\n"),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(chunk, max_size=8), cuts=st.lists(st.integers(1, 200), max_size=8))
def test_nothing_is_lost_and_only_whole_chunks_pass(way: Way, pieces: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(pieces)
    passed, place = [], 0
    for size in [*cuts, len(stream)]:
        sent, place = stream[place : place + size], place + size
        if not sent:
            continue
        if not way.shortcut.is_open:
            way.open()
        before = len(way.kept)
        told = way.send(sent)
        if told:
            assert told == [sent]
            assert way.received() == b""
            assert len(way.kept) == before
        else:
            assert way.received() == sent == bytes(way.kept)[before:]
            passed.append(sent)
    for data in passed:
        scanner = ChunkScanner()
        assert scanner.feed(data) == -1
        assert scanner.at_boundary
        assert data.endswith(b"\n\n\r\n")
    way.kept.clear()


def test_what_the_client_does_not_take_is_told_with_how_much_it_took(way: Way) -> None:
    way.sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    way.open()
    data = frame(b"data: " + b"x" * 9000 + b"\n\n")
    got = b""
    told: list[Any] = []
    number = 0
    while not told:
        told = way.send(data)
        number += 1
    ((last, sent),) = told
    assert last == data
    assert 0 <= sent < len(data)
    assert not way.shortcut.is_open
    assert way.shortcut.pieces == number  # it is counted: only the rest of it is to be sent
    assert bytes(way.kept) == data * number
    way.client.settimeout(5)
    while len(got) < (number - 1) * len(data) + sent:
        got += way.client.recv(1 << 20)
    assert got == (data * number)[: len(got)]


def test_dense_chunks_all_pass_in_order(way: Way) -> None:
    way.open()
    chunks = [frame(b"data: %d\n\n" % number) for number in range(5_000)]

    room = threading.Semaphore(20)  # much at once is no stream of tokens

    def speak() -> None:
        for chunk in chunks:
            assert room.acquire(timeout=10)
            way.engine.sendall(chunk)

    got = bytearray()
    expected = b"".join(chunks)
    speaker = threading.Thread(target=speak)
    speaker.start()
    end = time.monotonic() + 30
    while len(got) < len(expected) and time.monotonic() < end:
        assert not way._wait(way.epoll.fileno(), 0.002)
        new = way.received()
        got += new
        if new:
            room.release(new.count(b"\n\n\r\n"))
    speaker.join()
    assert bytes(got) == expected == bytes(way.kept)
    assert not way._wait(way.epoll.fileno(), 0.0)


def test_it_ends_when_so_much_is_kept(compiled: ModuleType, way: Way) -> None:
    way.shortcut = compiled.Shortcut(array("d", BOUNDS), way.counts, way.kept, len(frame(EVENT)) + 1)
    way.open()
    data = frame(EVENT)
    assert [way.send(data) for _ in range(3)] == [[], [], [data]]
    assert not way.shortcut.is_open


def test_nothing_needs_to_be_kept(compiled: ModuleType, way: Way) -> None:
    way.shortcut = compiled.Shortcut(array("d", BOUNDS), way.counts, None, 0)
    way.open()
    data = frame(EVENT)
    assert way.send(data) == []
    assert way.received() == data
    way.client.close()  # with nothing unread
    told = [way.send(data) for _ in range(3)]
    assert told[-1] == [select.EPOLLIN]
    assert [data] in told  # for whoever sends it again and gets the error


@pytest.mark.parametrize("reset", [False, True])
def test_an_engine_that_goes_is_told(way: Way, reset: bool) -> None:
    way.open()
    if reset:
        way.engine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    way.engine.close()
    (mask,) = way.serve()[1::2]
    assert mask & select.EPOLLIN
    if reset:
        with pytest.raises(ConnectionResetError):
            way.source.recv(10)
    else:
        assert way.source.recv(10) == b""


def test_what_shortcuts_received_is_told_before_other_events(compiled: ModuleType, way: Way) -> None:
    """Another event may end the request that it belongs to."""
    way.open()
    others = [pair() for _ in range(3)]
    for near, far in others:
        way.epoll.register(far.fileno(), select.EPOLLIN)
        near.send(b"x")
    way.engine.send(b"irregular")
    for _, far in others:
        select.select([far], [], [], 5)
    found = way.serve()
    assert found[:2] == [way.source.fileno(), b"irregular"]
    assert sorted(found[2::2]) == sorted(far.fileno() for _, far in others)
    for near, far in others:
        near.close()
        far.close()


def test_it_waits_on_until_the_time_is_over(compiled: ModuleType, way: Way) -> None:
    way.open()
    way.engine.send(frame(EVENT))
    assert compiled.wait_ready(way.epoll.fileno(), 0.05) == []
    assert way.received() == frame(EVENT)


def test_a_closed_one_passes_nothing(way: Way) -> None:
    way.open()
    way.shortcut.close()
    way.shortcut.close()
    assert not way.shortcut.is_open
    assert way.send(frame(EVENT)) == [select.EPOLLIN]


def test_one_that_is_gone_passes_nothing_and_lets_go(way: Way) -> None:
    way.open()
    held = sys.getrefcount(way.kept)
    del way.shortcut
    let_go = sys.getrefcount(way.kept)
    assert let_go == held - 1
    way.counts.append(1.0)  # an error while somebody holds its buffer
    assert way.send(frame(EVENT)) == [select.EPOLLIN]


def test_a_source_has_one(compiled: ModuleType, way: Way) -> None:
    way.open()
    other = compiled.Shortcut(array("d", BOUNDS), array("d", [0.0] * 5), None, 0)
    other.open(way.source.fileno(), way.sink.fileno(), 0.0)
    assert not way.shortcut.is_open
    assert way.send(frame(EVENT)) == []
    assert (way.shortcut.pieces, other.pieces) == (0, 1)
    way.shortcut.close()  # not the other one
    assert other.is_open
    other.open(way.source.fileno(), way.sink.fileno(), 0.0)
    assert other.is_open


def test_any_descriptor(compiled: ModuleType) -> None:
    shortcuts = [compiled.Shortcut(array("d"), array("d", [0.0] * 2), None, 0) for _ in range(5)]
    for number, shortcut in enumerate(shortcuts):
        shortcut.open(511 << number * 4, 1, 0.0)
    shortcuts.pop().close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        ((array("d"), array("d", [0.0]), None, 0), ValueError),
        ((array("f"), array("d", [0.0, 0.0]), None, 0), TypeError),
        ((array("d"), b"0123456789abcdef", None, 0), BufferError),
        (("text", array("d", [0.0, 0.0]), None, 0), TypeError),
        ((array("d"), array("d", [0.0, 0.0]), [], 0), TypeError),
    ],
)
def test_what_makes_no_shortcut(compiled: ModuleType, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        compiled.Shortcut(*arguments)


def test_what_opens_none(compiled: ModuleType, way: Way) -> None:
    for arguments, error in [
        ((1, 2), TypeError),
        ((-1, 2, 0.0), ValueError),
        ((1, -1, 0.0), ValueError),
        ((2**40, 1, 0.0), OverflowError),
        (("1", 1, 0.0), TypeError),
        ((1, 1, "0"), TypeError),
    ]:
        with pytest.raises(error):
            way.shortcut.open(*arguments)
    with pytest.raises(TypeError):
        way.shortcut.__init__(array("d"), array("d", [0.0] * 2), None, 0)
    with pytest.raises(ValueError, match="open sockets"):
        compiled.Shortcut.__new__(compiled.Shortcut).open(1, 2, 0.0)
    assert not way.shortcut.is_open


def test_its_memory_is_given_back(compiled: ModuleType) -> None:
    kept = compiled.Tape()
    for _ in range(1000):
        compiled.Shortcut(array("d"), array("d", [0.0] * 2), kept, 0).open(7, 8, 0.0)
    held = sys.getrefcount(kept)
    assert held == 2
