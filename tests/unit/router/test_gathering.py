"""What sockets write that became ready together goes out together, and as well as alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from tests.unit.router.test_transport import PEERS, Recorder, numbers, pair, read, reset

MEGABYTE = 1024 * 1024


OnData = Callable[[Recorder, bytes], None]
Made = list[tuple[Recorder, socket.socket]]


def echo(self: Recorder, data: bytes) -> None:
    self.transport.write(data.upper())


class Sockets:
    """Transports with their peers."""

    def __init__(self) -> None:
        self.made: Made = []

    def make(self, number: int, on_data: OnData = echo) -> Made:
        for _ in range(number):
            self.add(Recorder(on_data))
        return self.made

    def add(self, protocol: Recorder) -> None:
        self.made.append((protocol, pair(protocol)))


@pytest.fixture
async def sockets() -> AsyncIterator[Sockets]:
    sockets = Sockets()
    yield sockets
    for protocol, _ in sockets.made:
        protocol.transport.abort()
        await protocol.until(lambda protocol=protocol: "lost" in protocol.told)
    while PEERS:
        PEERS.pop().close()


def has(peer: socket.socket) -> bool:
    try:
        return bool(peer.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def all_at_once(made: Made, data: bytes = b"question") -> None:
    """Lets all sockets be ready in one look, and served."""
    await asyncio.sleep(0)
    for _, peer in made:
        peer.send(data)
    for protocol, _ in made:
        await protocol.until(lambda protocol=protocol: len(protocol.data) >= len(data))


async def test_writes_wait_for_each_other_but_only_few(sockets: Sockets) -> None:
    seen: list[int] = []

    def answer(self: Recorder, data: bytes) -> None:
        seen.append(sum(has(peer) for _, peer in made))
        self.transport.write(data.upper())

    made = sockets.make(12, answer)
    await all_at_once(made)
    assert seen == [0] * 8 + [8] * 4
    for _, peer in made:
        assert await read(peer, 8) == b"QUESTION"


async def test_one_alone_writes_at_once(sockets: Sockets) -> None:
    seen: list[bool] = []

    def answer(self: Recorder, data: bytes) -> None:
        self.transport.write(data)
        seen.append(has(made[0][1]))

    made = sockets.make(1, answer)
    await all_at_once(made)
    assert seen == [True]


async def test_what_is_scheduled_meanwhile_writes_behind_it(sockets: Sockets) -> None:
    def answer(self: Recorder, data: bytes) -> None:
        self.transport.write(data)
        asyncio.get_running_loop().call_soon(self.transport.write, b" later")

    made = sockets.make(3, answer)
    await all_at_once(made)
    for _, peer in made:
        assert await read(peer, 14) == b"question later"


@pytest.mark.parametrize("ending", ["close", "write_eof"])
async def test_an_end_comes_behind_what_was_gathered(sockets: Sockets, ending: str) -> None:
    def answer(self: Recorder, data: bytes) -> None:
        self.transport.write(data)
        self.transport.write(data)
        getattr(self.transport, ending)()
        if ending == "write_eof":
            with pytest.raises(RuntimeError):
                self.transport.write(b"too late")

    made = sockets.make(3, answer)
    await all_at_once(made)
    for protocol, peer in made:
        assert await read(peer, 100) == b"questionquestion"
        peer.close()
        await protocol.until(lambda protocol=protocol: "lost" in protocol.told)
        assert protocol.told.count("lost") == 1


async def test_an_abort_takes_what_was_gathered_along(sockets: Sockets) -> None:
    def answer(self: Recorder, data: bytes) -> None:
        self.transport.write(data)
        self.transport.abort()
        self.transport.write(data)

    made = sockets.make(3, answer)
    await all_at_once(made)
    for protocol, peer in made:
        assert await read(peer, 100) == b""
        assert protocol.told == ["lost"]


@pytest.mark.parametrize("lines", [False, True])
async def test_what_the_socket_does_not_take_waits_in_order_and_the_protocol_is_told(
    sockets: Sockets, lines: bool
) -> None:
    whole = numbers(12 * MEGABYTE)
    pieces = [whole[at : at + 50_001] for at in range(0, len(whole), 50_001)]

    def answer(self: Recorder, _: bytes) -> None:
        if lines:
            self.transport.writelines(list(pieces))
        else:
            for piece in pieces:
                self.transport.write(piece)

    made = sockets.make(3, answer)
    await all_at_once(made)
    for protocol, peer in made:
        assert protocol.told == ["pause"]
        assert await read(peer, len(whole)) == whole
        await protocol.until(lambda protocol=protocol: protocol.told == ["pause", "resume"])
        assert protocol.transport.get_write_buffer_size() == 0
        protocol.transport.write(b"more")
        assert await read(peer, 4) == b"more"


async def test_a_peer_that_is_gone_ends_its_own_connection_only(sockets: Sockets) -> None:
    made = sockets.make(4)

    def answer(self: Recorder, data: bytes) -> None:
        if self is made[0][0]:
            reset(made[1][1])  # served next, it writes to nobody
        self.transport.write(data.upper())

    for protocol, _ in made:
        protocol.on_data = answer
    await all_at_once(made)
    await made[1][0].until(lambda: "lost" in made[1][0].told)
    for index in (0, 2, 3):
        assert await read(made[index][1], 8) == b"QUESTION"
        assert made[index][0].told == []


async def test_a_protocol_that_fails_when_it_may_go_on_ends_its_own_connection_only(sockets: Sockets) -> None:
    class Failing(Recorder):
        def pause_writing(self) -> None:
            raise ValueError("on purpose")

    failing = Failing(lambda self, _: self.transport.writelines([b"x" * 1000] * 20_000))
    sockets.add(failing)
    made = sockets.make(2)
    errors: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: errors.append(str(context["exception"]))
    )
    await all_at_once(made)
    await failing.until(lambda: "lost" in failing.told)
    assert errors == ["on purpose"]
    for _, peer in made[1:]:
        assert await read(peer, 8) == b"QUESTION"
