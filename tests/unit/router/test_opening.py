"""Connections that are being opened: whoever waits is told once, at once only of success."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Iterator

import pytest

from modelfleet_serving.router.opening import Opening, family_of
from modelfleet_serving.router.sockets import poller_of


class Waiting:
    """What an opening tells."""

    def __init__(self, address: tuple[str, int], timeout: float = 10.0) -> None:
        loop = asyncio.get_running_loop()
        self.told: list[str] = []
        self.connected: socket.socket | None = None
        self.changed = asyncio.Event()
        family = family_of(address[0])
        self.opening = Opening(loop, poller_of(loop), family, address, timeout, self._tell)

    def _tell(self, connected: socket.socket | None, reason: str) -> None:
        self.connected = connected
        self.told.append(reason)
        self.changed.set()

    async def outcome(self) -> socket.socket | None:
        async with asyncio.timeout(20):
            await self.changed.wait()
        await asyncio.sleep(0)
        assert len(self.told) == 1
        return self.connected


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield server


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server with a connection that nobody takes, and room for no other: it answers nobody else."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        server.settimeout(10)
        with socket.create_connection(server.getsockname()):
            yield server


async def test_a_neighbour_has_answered_at_once(server: socket.socket) -> None:
    waiting = Waiting(server.getsockname())
    waiting.opening.start()
    connected = await waiting.outcome()
    assert waiting.told == [""]
    assert connected is not None
    other, _ = server.accept()
    with connected, other:
        assert not connected.getblocking()
        connected.sendall(b"hello")
        assert other.recv(9) == b"hello"


async def test_who_refuses_is_told_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    waiting = Waiting(address)
    waiting.opening.start()
    assert not waiting.told
    assert await waiting.outcome() is None
    assert waiting.told == ["Connection refused"]


async def test_no_descriptor_to_be_had_is_told_later(server: socket.socket) -> None:
    waiting = Waiting(server.getsockname())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with server.dup() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 1, hard))  # all below are taken
        try:
            waiting.opening.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not waiting.told
    assert await waiting.outcome() is None
    assert waiting.told == ["Too many open files"]


async def test_an_address_without_a_way_is_told_later() -> None:
    waiting = Waiting(("255.255.255.255", 9))
    waiting.opening.start()
    assert not waiting.told
    assert await waiting.outcome() is None
    assert waiting.told[0]


async def test_silence_ends_with_the_time_and_leaves_nothing(silent: socket.socket) -> None:
    waiting = Waiting(silent.getsockname(), timeout=0.1)
    waiting.opening.start()
    assert await waiting.outcome() is None
    assert waiting.told == ["no connection within 0.1 s"]
    waiting.opening.cancel()
    await asyncio.sleep(0.05)
    assert len(waiting.told) == 1


async def test_a_late_answer_counts(silent: socket.socket) -> None:
    waiting = Waiting(silent.getsockname())
    waiting.opening.start()
    await asyncio.sleep(0.05)
    assert not waiting.told
    silent.accept()[0].close()  # the kernel's next attempt finds room
    connected = await waiting.outcome()
    assert waiting.told == [""]
    assert connected is not None
    with connected:
        assert connected.getpeername() == silent.getsockname()


@pytest.mark.parametrize("refused", [False, True])
async def test_nobody_is_told_of_what_was_cancelled(silent: socket.socket, *, refused: bool) -> None:
    address = silent.getsockname()
    if refused:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = gone.getsockname()
    waiting = Waiting(address, timeout=0.05)
    waiting.opening.start()
    waiting.opening.cancel()
    waiting.opening.cancel()
    await asyncio.sleep(0.15)
    assert not waiting.told


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        ("::1", socket.AF_INET6),
        ("fe80::1", socket.AF_INET6),
        ("localhost", 0),
        ("engine-0.engines", 0),
        ("1.2.3", 0),
        ("", 0),
        ("a\0b", 0),
    ],
)
def test_numbers_are_told_from_names(host: str, family: int) -> None:
    assert family_of(host) == family
