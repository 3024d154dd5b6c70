"""A worker as a process of its own, and what it and the supervisor say to each other."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.event_loop import run
from modelfleet_serving.router.hub import TableChange
from modelfleet_serving.router.observe import Snapshot
from modelfleet_serving.router.settings import Settings
from modelfleet_serving.router.sockets import Listener
from modelfleet_serving.router.worker import Worker

_log = logging.getLogger(__name__)

CALL_SECONDS: Final = 30.0
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"


class Start(msgspec.Struct, tag=True):
    """The first message to a worker."""

    settings: Settings
    host: str
    port: int
    worker: int


class Change(msgspec.Struct, tag=True):
    """Supervisor: take over, then answer ``Done``."""

    call: int
    change: TableChange


class Ask(msgspec.Struct, tag=True):
    """Supervisor: answer with ``Figures``."""

    call: int


class Listen(msgspec.Struct, tag=True):
    """Supervisor: accept connections, then say ``Listening``."""


class Drain(msgspec.Struct, tag=True):
    """Supervisor: finish what runs, then end."""


class Done(msgspec.Struct, tag=True):
    """Worker: routes by the change."""

    call: int


class Figures(msgspec.Struct, tag=True):
    """Worker: what it has counted."""

    call: int
    snapshot: Snapshot


class Listening(msgspec.Struct, tag=True):
    """Worker: accepts connections."""


class Scrape(msgspec.Struct, tag=True):
    """Worker: a client wants the metrics of all; answered with ``Page``."""

    call: int


class Page(msgspec.Struct, tag=True):
    """Supervisor: the metrics."""

    call: int
    text: bytes


Message = Start | Change | Ask | Listen | Drain | Done | Figures | Listening | Scrape | Page
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Message).decode


class Channel:
    """Messages over a socket pair, with calls that wait for their answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        """A channel over one end of a socket pair."""
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, message: Message) -> None:
        """Sends without waiting."""
        data = _encode(message)
        self._writer.write(len(data).to_bytes(4, "big") + data)

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ConnectionError: when the other side is gone.
        """
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            message: Message = _decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ConnectionError("the other process is gone") from error
        return message

    async def call(self, make: Callable[[int], Message]) -> Message:
        """Sends what ``make`` makes of a call number, and waits for the answer to it."""
        number = next(self._calls)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self.send(make(number))
            async with asyncio.timeout(CALL_SECONDS):
                return await future
        finally:
            del self._waiting[number]

    def answered(self, number: int, message: Message) -> None:
        """Hands an answer to the call that waits for it."""
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_result(message)

    def close(self) -> None:
        """Closes this end; calls that wait fail."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("the other process is gone"))
        self._writer.close()


async def _serve(end: socket.socket, counters_fd: int) -> None:
    channel = await Channel.open(end)
    start = await channel.receive()
    if not isinstance(start, Start):
        raise TypeError(f"expected the start message, got {type(start).__name__}")
    loop = asyncio.get_running_loop()
    counters = Counters(start.settings.workers, start.worker, counters_fd)

    async def scrape() -> bytes:
        page = await channel.call(Scrape)
        return page.text if isinstance(page, Page) else b""

    worker = Worker(start.settings, counters, loop, scrape)
    try:
        await _follow(channel, worker, start)
    except ConnectionError:
        _log.error("the supervisor is gone")
    finally:
        await worker.close()
        channel.close()


async def _follow(channel: Channel, worker: Worker, start: Start) -> None:
    """Does what the supervisor says until it says to end."""
    server: Listener | asyncio.Server | None = None
    while True:
        message = await channel.receive()
        match message:
            case Change(call=call, change=change):
                await worker.change(change)
                channel.send(Done(call))
            case Ask(call=call):
                channel.send(Figures(call, await worker.snapshot()))
            case Page(call=call):
                channel.answered(call, message)
            case Listen():
                server = await worker.listen(start.host, start.port)
                channel.send(Listening())
            case Drain():
                if server is not None:
                    await _until_drained(channel, worker.drain(server), worker)
                return
            case _:
                _log.warning("unexpected message %s", type(message).__name__)


async def _until_drained(channel: Channel, drained: Awaitable[None], worker: Worker) -> None:
    """Drains while the supervisor may still ask for figures."""
    draining = asyncio.ensure_future(drained)
    while not draining.done():
        receiving = asyncio.ensure_future(channel.receive())
        await asyncio.wait((draining, receiving), return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            receiving.cancel()
            break
        match receiving.result():
            case Ask(call=call):
                channel.send(Figures(call, await worker.snapshot()))
            case Page(call=call) as page:
                channel.answered(call, page)
            case _:
                pass
    await draining


def tune_collector() -> None:
    """Requests make few cycles: the collector need not look at every connection all the time.

    What it looks at, it looks at without a pause, cold memory included: 20,000 objects take 35 ms on a slow
    machine. So it looks at few at a time, and at those of a large route table hardly ever.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 3, 1_000)


def main() -> None:
    """Entry point of a worker process: ``SOCKET_FD COUNTERS_FD LOG_LEVEL plain|tls``."""
    logging.basicConfig(level=sys.argv[3].upper(), format=LOG_FORMAT)
    # The supervisor decides when to stop; a Ctrl-C in the terminal reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tune_collector()
    run(_serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])), tls=sys.argv[4] == "tls")


if __name__ == "__main__":
    main()
