"""The data path's system calls, in C and by the standard library: the same answers from both."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfleet_serving.router import wire

MEGABYTE = 1024 * 1024


class Standard:
    """The calls as they are without a compiler."""

    receive = staticmethod(wire.receive_standard)
    transmit = staticmethod(wire.transmit_standard)
    transmit_pieces = staticmethod(wire.transmit_pieces_standard)


@pytest.fixture(params=["C", "standard"])
def calls(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("compiled") if request.param == "C" else Standard


@pytest.fixture
def waiter(calls: Any) -> Callable[[select.epoll], Callable[[float], list[int]]]:
    if calls is Standard:
        return wire.waiter_standard
    return lambda epoll: partial(calls.wait_ready, epoll.fileno())


def drain(end: socket.socket, size: int) -> bytes:
    """What comes, up to a number of bytes."""
    end.settimeout(5)
    got = bytearray()
    while len(got) < size and (data := end.recv(MEGABYTE)):
        got += data
    return bytes(got)


@pytest.mark.parametrize("expected", [0, 8 * 1024, 100_000, 10 * MEGABYTE])
def test_receives_what_there_is_nothing_and_the_end(calls: Any, ends: Any, expected: int) -> None:
    near, far = ends
    assert calls.receive(near.fileno(), expected) is None
    far.send(b"hello")
    select.select([near], [], [], 5)
    assert calls.receive(near.fileno(), expected) == b"hello"
    assert calls.receive(near.fileno(), expected) is None
    far.close()
    select.select([near], [], [], 5)
    assert calls.receive(near.fileno(), expected) == b""


@pytest.mark.parametrize("expected", [0, 8 * 1024, 100_000, 10 * MEGABYTE])
def test_receives_much_in_pieces(calls: Any, ends: Any, expected: int) -> None:
    near, far = ends
    whole = os.urandom(3 * MEGABYTE)
    sender = threading.Thread(target=lambda: (far.setblocking(True), far.sendall(whole)))
    sender.start()
    got = b""
    while len(got) < len(whole):
        select.select([near], [], [], 5)
        got += calls.receive(near.fileno(), expected) or b""
    sender.join(5)
    assert got == whole


@pytest.mark.parametrize("expected", [0, 8 * 1024, 100_000, 10 * MEGABYTE])
def test_a_reset_is_an_error_of_the_connection(calls: Any, ends: Any, expected: int) -> None:
    near, far = ends
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    select.select([near], [], [], 5)
    with pytest.raises(ConnectionResetError):
        calls.receive(near.fileno(), expected)
    # No signal ends the process.
    with pytest.raises(BrokenPipeError):
        calls.transmit(near.fileno(), b"x")
    with pytest.raises(BrokenPipeError):
        calls.transmit_pieces(near.fileno(), [b"x", b"y"])


def test_a_closed_descriptor_is_an_error(calls: Any) -> None:
    for call in (
        lambda: calls.receive(-1, 0),
        lambda: calls.transmit(-1, b"x"),
        lambda: calls.transmit_pieces(-1, [b"x"]),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    with pytest.raises(OverflowError):
        calls.receive(2**40, 0)
    with pytest.raises(TypeError):
        calls.receive("1", 0)


def test_sends_as_much_as_the_socket_takes(calls: Any, ends: Any) -> None:
    near, far = ends
    whole = os.urandom(16 * MEGABYTE)
    taken = calls.transmit(near.fileno(), whole)
    assert 0 < taken < len(whole)
    while more := calls.transmit(near.fileno(), memoryview(whole)[taken:]):
        taken += more
    assert calls.transmit(near.fileno(), b"x") == 0
    assert calls.transmit_pieces(near.fileno(), [b"x", b"y"]) == 0
    assert drain(far, taken) == whole[:taken]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_sends_any_bytes(calls: Any, ends: Any, kind: type) -> None:
    near, far = ends
    assert calls.transmit(near.fileno(), kind(b"hello ")) == 6
    assert calls.transmit_pieces(near.fileno(), (kind(b"wor"), b"", kind(b"ld"))) == 5
    assert drain(far, 11) == b"hello world"


def test_what_are_no_bytes_is_refused_and_nothing_is_sent_or_kept(calls: Any, ends: Any) -> None:
    near, far = ends
    piece = os.urandom(32)
    before = sys.getrefcount(piece)
    with pytest.raises(TypeError):
        calls.transmit(near.fileno(), "text")
    with pytest.raises(TypeError):
        calls.transmit_pieces(near.fileno(), [piece, piece, "text"])
    with pytest.raises(TypeError):
        calls.transmit_pieces(near.fileno(), 5)
    assert sys.getrefcount(piece) == before
    calls.transmit(near.fileno(), b"end")
    assert drain(far, 3) == b"end"


def test_a_view_can_be_released_afterwards(calls: Any, ends: Any) -> None:
    near, _ = ends
    data = bytearray(b"hello")
    calls.transmit(near.fileno(), data)
    calls.transmit_pieces(near.fileno(), [data, memoryview(data)])
    data.append(1)  # an error while somebody holds its buffer


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5000), max_size=150))
def test_pieces_come_in_order(calls: Any, ends: Any, sizes: list[int]) -> None:
    near, far = ends
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    most = pieces[: wire.MAX_PIECES]
    taken = calls.transmit_pieces(near.fileno(), pieces)
    assert taken == len(b"".join(most))
    assert drain(far, taken) == b"".join(most)


def test_waits_for_events_and_tells_all_of_them(waiter: Any, ends: Any) -> None:
    near, far = ends
    with select.epoll() as epoll:
        epoll.register(near.fileno(), select.EPOLLIN | select.EPOLLOUT)
        epoll.register(far.fileno(), select.EPOLLIN)
        assert waiter(epoll)(-1.0) == [near.fileno(), select.EPOLLOUT]
        near.send(b"x")
        found = waiter(epoll)(5.0)
        pairs = set(zip(found[::2], found[1::2], strict=True))
        assert pairs == {(near.fileno(), select.EPOLLOUT), (far.fileno(), select.EPOLLIN)}


@pytest.mark.parametrize("seconds", [0.0, 0.0104])
def test_waits_no_shorter_than_asked(waiter: Any, seconds: float) -> None:
    with select.epoll() as epoll:
        began = time.monotonic()
        assert waiter(epoll)(seconds) == []
        assert time.monotonic() - began >= seconds


def test_other_threads_run_while_it_waits(waiter: Any, ends: Any) -> None:
    near, far = ends
    with select.epoll() as epoll:
        epoll.register(near.fileno(), select.EPOLLIN)
        waker = threading.Timer(0.02, far.send, [b"x"])
        waker.start()
        assert waiter(epoll)(5.0) == [near.fileno(), select.EPOLLIN]
        waker.join(5)


def test_signals_are_handled_while_it_waits(waiter: Any, ends: Any) -> None:
    near, far = ends

    def handle(*_: object) -> None:
        far.send(b"x")

    before = signal.signal(signal.SIGUSR1, handle)
    waker = threading.Timer(
        0.02, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    )
    try:
        with select.epoll() as epoll:
            epoll.register(near.fileno(), select.EPOLLIN)
            waker.start()
            found = waiter(epoll)(5.0) or waiter(epoll)(5.0)
            assert found == [near.fileno(), select.EPOLLIN]
    finally:
        waker.join(5)
        signal.signal(signal.SIGUSR1, before)


def test_a_closed_epoll_is_an_error(waiter: Any) -> None:
    epoll = select.epoll()
    wait = waiter(epoll)
    epoll.close()
    with pytest.raises((OSError, ValueError)):
        wait(0.0)
