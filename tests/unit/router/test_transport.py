"""The data path's sockets: nothing is lost or torn, slow peers are told, the loop's own work goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modelfleet_serving.router.sockets import Listener, connect, poller_of
from modelfleet_serving.router.transport import SocketTransport

MEGABYTE = 1024 * 1024


class Recorder(asyncio.Protocol):
    """Remembers what it is told."""

    def __init__(self, on_data: Callable[[Recorder, bytes], None] | None = None) -> None:
        self.on_data = on_data
        self.data = bytearray()
        self.told: list[str] = []
        self.changed = asyncio.Event()
        self.error: Exception | None = None
        self.transport: SocketTransport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.changed.set()
        if self.on_data is not None:
            self.on_data(self, data)

    def eof_received(self) -> bool | None:
        self.told.append("eof")
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")
        self.error = exc
        self.changed.set()

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def pair(protocol: Recorder) -> socket.socket:
    """A transport for the protocol; returns the peer's socket, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    for end in (ours, peer):
        end.setblocking(False)
    loop = asyncio.get_running_loop()
    SocketTransport(loop, poller_of(loop), ours, protocol)
    PEERS.append(peer)
    return peer


PEERS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_peers() -> Iterator[None]:
    yield
    while PEERS:
        PEERS.pop().close()


async def read(peer: socket.socket, size: int) -> bytes:
    """Reads `size` bytes, or to the end if that comes first."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    async with asyncio.timeout(10):
        while len(data) < size:
            piece = await loop.sock_recv(peer, min(256 * 1024, size - len(data)))
            if not piece:
                break
            data += piece
    return bytes(data)


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def numbers(size: int) -> bytes:
    return b"".join(b"%09d," % n for n in range(size // 10))


async def test_bytes_pass_both_ways_and_the_end_of_the_peer_ends_the_connection() -> None:
    protocol = Recorder(lambda self, data: self.transport.write(data.upper()))
    peer = pair(protocol)
    assert protocol.transport.get_extra_info("peername") == peer.getsockname()
    assert protocol.transport.get_extra_info("cipher", "none") == "none"
    peer.send(b"question")
    assert await read(peer, 8) == b"QUESTION"
    peer.close()
    await protocol.until(lambda: "lost" in protocol.told)
    assert (protocol.told, protocol.error) == (["eof", "lost"], None)
    assert protocol.transport.is_closing()


@pytest.mark.parametrize("lines", [False, True])
async def test_what_a_slow_peer_leaves_waits_in_order_and_the_protocol_is_told(lines: bool) -> None:
    protocol = Recorder()
    peer = pair(protocol)
    protocol.transport.set_write_buffer_limits(high=MEGABYTE)
    whole = numbers(12 * MEGABYTE)
    pieces = [whole[at : at + 100_001] for at in range(0, len(whole), 100_001)]
    for at in range(0, len(pieces), 3):
        if lines:
            protocol.transport.writelines(pieces[at : at + 3])
        else:
            for piece in pieces[at : at + 3]:
                protocol.transport.write(piece)
    assert protocol.told == ["pause"]
    assert protocol.transport.get_write_buffer_size() > MEGABYTE
    assert await read(peer, len(whole)) == whole
    await protocol.until(lambda: protocol.told == ["pause", "resume"])
    assert protocol.transport.get_write_buffer_size() == 0
    protocol.transport.write(b"more")  # and goes on as before
    assert await read(peer, 4) == b"more"
    peer.close()


async def test_close_writes_what_waits() -> None:
    protocol = Recorder()
    peer = pair(protocol)
    whole = numbers(8 * MEGABYTE)
    protocol.transport.write(whole)
    protocol.transport.close()
    protocol.transport.write(b"too late")
    assert await read(peer, len(whole) + 1) == whole
    await protocol.until(lambda: "lost" in protocol.told)
    assert protocol.told[-1] == "lost"


async def test_abort_drops_what_waits_and_tells_once() -> None:
    protocol = Recorder()
    peer = pair(protocol)
    protocol.transport.write(numbers(8 * MEGABYTE))
    protocol.transport.abort()
    protocol.transport.abort()
    protocol.transport.close()
    assert protocol.told == ["pause"]  # not from within
    await protocol.until(lambda: "lost" in protocol.told)
    await asyncio.sleep(0)
    assert protocol.told == ["pause", "lost"]
    peer.close()


@pytest.mark.parametrize("pieces", [1, 5])
async def test_a_protocol_may_end_the_connection_when_much_waits(pieces: int) -> None:
    class Impatient(Recorder):
        def pause_writing(self) -> None:
            super().pause_writing()
            self.transport.abort()

    protocol = Impatient()
    peer = pair(protocol)
    protocol.transport.writelines([numbers(8 * MEGABYTE)] * pieces)
    assert protocol.transport.get_write_buffer_size() == 0
    await protocol.until(lambda: "lost" in protocol.told)
    assert protocol.told == ["pause", "lost"]
    protocol.transport.write(b"nobody gets this")
    protocol.transport.writelines([b"nor", b"this"])
    protocol.transport.resume_reading()
    peer.close()


async def test_a_closed_connection_touches_no_later_one_with_its_descriptor() -> None:
    old = Recorder()
    peer = pair(old)
    number = old.transport.get_extra_info("socket").fileno()
    old.transport.close()
    await old.until(lambda: "lost" in old.told)
    peer.close()
    later = Recorder()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    if ours.fileno() != number:
        os.dup2(ours.fileno(), number)
        ours.close()
        ours = socket.socket(fileno=number)
    ours.setblocking(False)
    far.setblocking(False)
    loop = asyncio.get_running_loop()
    SocketTransport(loop, poller_of(loop), ours, later)
    for call in (
        lambda: old.transport.write(b"x"),
        lambda: old.transport.writelines([b"x", b"y"]),
        old.transport.pause_reading,
        old.transport.resume_reading,
        old.transport.write_eof,
        old.transport.close,
        old.transport.abort,
    ):
        call()
    far.send(b"hello")
    await later.until(lambda: later.data == b"hello")
    later.transport.write(b"end")
    assert await read(far, 3) == b"end"
    later.transport.close()
    await later.until(lambda: "lost" in later.told)
    far.close()


async def test_the_end_of_what_is_written_comes_after_it_and_reading_goes_on() -> None:
    protocol = Recorder()
    peer = pair(protocol)
    whole = numbers(8 * MEGABYTE)
    protocol.transport.write(whole)
    assert protocol.transport.can_write_eof()
    protocol.transport.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        protocol.transport.write(b"more")
    assert await read(peer, len(whole) + 1) == whole
    peer.send(b"still here")
    await protocol.until(lambda: protocol.data == b"still here")
    peer.close()
    await protocol.until(lambda: "lost" in protocol.told)


@pytest.mark.parametrize("writing", [False, True])
async def test_a_reset_is_told_with_its_error(writing: bool) -> None:
    protocol = Recorder()
    peer = pair(protocol)
    if writing:
        protocol.transport.pause_reading()  # found by the writing alone
        protocol.transport.write(numbers(8 * MEGABYTE))
    reset(peer)
    await protocol.until(lambda: "lost" in protocol.told)
    assert isinstance(protocol.error, ConnectionError)


async def test_nothing_is_read_while_paused() -> None:
    protocol = Recorder()
    peer = pair(protocol)
    protocol.transport.pause_reading()
    peer.send(b"one")
    await asyncio.sleep(0.05)
    assert protocol.data == b""
    protocol.transport.resume_reading()
    await protocol.until(lambda: protocol.data == b"one")
    peer.close()
    await protocol.until(lambda: "lost" in protocol.told)


async def test_a_protocol_that_fails_loses_its_connection_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_: Recorder, data: bytes) -> None:
        raise ValueError("no such thing")

    broken, sound = Recorder(fail), Recorder()
    first, second = pair(broken), pair(sound)
    first.send(b"x")
    second.send(b"y")
    await broken.until(lambda: "lost" in broken.told)
    assert isinstance(broken.error, ValueError)
    await sound.until(lambda: sound.data == b"y")
    assert "a protocol of the data path failed" in caplog.text
    first.close()
    second.close()
    await sound.until(lambda: "lost" in sound.told)


async def test_a_protocol_that_fails_when_it_may_write_again_loses_its_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Recorder):
        def resume_writing(self) -> None:
            raise ValueError("no such thing")

    protocol = Failing()
    peer = pair(protocol)
    whole = numbers(8 * MEGABYTE)
    protocol.transport.write(whole)
    assert await read(peer, len(whole)) == whole
    await protocol.until(lambda: "lost" in protocol.told)
    assert isinstance(protocol.error, ValueError)
    assert "a protocol of the data path failed" in caplog.text


async def test_connections_may_end_each_other_in_one_round_of_events() -> None:
    def end_all(_: Recorder, data: bytes) -> None:
        for each in protocols:
            each.transport.abort()

    protocols = [Recorder(end_all) for _ in range(20)]
    peers = [pair(protocol) for protocol in protocols]
    for peer in peers:
        peer.send(b"x")
    for protocol in protocols:
        await protocol.until(lambda: "lost" in protocol.told)  # noqa: B023  awaited at once
    assert sum(bool(protocol.data) for protocol in protocols) == 1
    for peer in peers:
        peer.close()


async def test_traffic_without_pause_does_not_keep_timers_tasks_and_threads_waiting() -> None:
    loop = asyncio.get_running_loop()
    protocol = Recorder(lambda self, data: self.transport.write(data))
    peer = pair(protocol)
    stop = threading.Event()
    peer.setblocking(True)
    peer.settimeout(5)
    called = loop.create_future()

    def busy() -> None:  # a peer that always has the next piece on its way
        for _ in range(20):
            peer.send(b"ping")
        while not stop.is_set():
            peer.send(peer.recv(4096))
        loop.call_soon_threadsafe(called.set_result, "by a thread")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        async with asyncio.timeout(5):
            for _ in range(50):
                await asyncio.sleep(0.001)
                await asyncio.sleep(0)
            before = len(protocol.data)
            woken = loop.create_future()

            def echo_and_wake(self: Recorder, data: bytes) -> None:
                self.transport.write(data)
                if not woken.done():
                    woken.set_result("by an event")

            protocol.on_data = echo_and_wake
            assert await woken == "by an event"
            assert len(protocol.data) > before
            stop.set()
            assert await called == "by a thread"
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
        peer.close()
    await protocol.until(lambda: "lost" in protocol.told)


async def test_the_next_address_is_tried_and_failures_name_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    served = Recorder()
    listener = await Listener.open(loop, poller_of(loop), lambda: served, "127.0.0.1", 0, backlog=8)
    good = listener.sockets[0].getsockname()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        bad = gone.getsockname()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (bad, good)]

    really = loop.getaddrinfo

    async def resolve(host: str, port: int, **named: Any) -> list[Any]:
        return found if host == "engine" else await really(host, port, **named)

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    client = Recorder()
    await connect(loop, poller_of(loop), "engine", 1, client)
    client.transport.write(b"hello")
    await served.until(lambda: served.data == b"hello")
    client.transport.close()
    await served.until(lambda: "lost" in served.told)
    found[:] = found[:1] * 2
    with pytest.raises(OSError, match=rf"{bad[1]}.*; .*{bad[1]}"):
        await connect(loop, poller_of(loop), "engine", 1, Recorder())
    found[:] = found[:1]
    with pytest.raises(ConnectionRefusedError):
        await connect(loop, poller_of(loop), "engine", 1, Recorder())
    found.clear()
    with pytest.raises(OSError, match="engine has no address"):
        await connect(loop, poller_of(loop), "engine", 1, Recorder())
    listener.close()
    listener.close()
    await client.until(lambda: "lost" in client.told)


async def test_a_taken_address_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"can't listen on 127.0.0.1:{port}: address already in use"):
            await Listener.open(loop, poller_of(loop), Recorder, "127.0.0.1", port, backlog=8)


async def test_without_descriptors_it_waits_and_then_accepts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    made = asyncio.Event()

    class Noting(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            made.set()

    monkeypatch.setattr("modelfleet_serving.router.sockets._PAUSE_SECONDS", 0.05)
    listener = await Listener.open(loop, poller_of(loop), Noting, "127.0.0.1", 0, backlog=8)

    class Exhausted:
        def __init__(self, real: socket.socket) -> None:
            self.real = real
            self.left = 2

        def fileno(self) -> int:
            return self.real.fileno()

        def accept(self) -> tuple[socket.socket, Any]:
            self.left -= 1
            if self.left >= 0:
                raise OSError(errno.EMFILE, "too many open files")
            return self.real.accept()

    real = listener.sockets[0]
    loop.remove_reader(real.fileno())
    listener._begin(Exhausted(real))  # type: ignore[arg-type]
    client = Recorder()
    await connect(loop, poller_of(loop), *real.getsockname(), client)
    async with asyncio.timeout(5):
        await made.wait()
    assert caplog.text.count("no connections are accepted") == 2
    listener.close()
    client.transport.abort()
    await client.until(lambda: "lost" in client.told)
