"""Starts the workers, in this process or as several, and keeps them running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Final

from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.hub import Hub, TableChange
from modelfleet_serving.router.observe import Snapshot
from modelfleet_serving.router.process import (
    Ask,
    Change,
    Channel,
    Done,
    Drain,
    Figures,
    Listen,
    Listening,
    Page,
    Scrape,
    Start,
)
from modelfleet_serving.router.settings import Settings
from modelfleet_serving.router.worker import Worker

_log = logging.getLogger(__name__)

_RESTART_SECONDS: Final = (0.1, 0.5, 2.0, 5.0)


class WorkerLink:
    """One worker process as the hub sees it."""

    def __init__(self, channel: Channel, hub: Hub, kill: Callable[[], None]) -> None:
        self._channel = channel
        self._hub = hub
        self._kill = kill
        self._tasks: set[asyncio.Task[None]] = set()
        self.listening = asyncio.Event()

    async def change(self, change: TableChange) -> None:
        """Returns once the worker routes by the new table; one that died gets it when it is back."""
        try:
            await self._channel.call(lambda call: Change(call, change))
        except ConnectionError:
            return
        except TimeoutError:
            _log.error("a worker does not take over the table; it is ended")
            self._kill()

    async def snapshot(self) -> Snapshot:
        """What the worker has counted."""
        answer = await self._channel.call(Ask)
        if not isinstance(answer, Figures):
            raise ConnectionError("the worker answered something else")
        return answer.snapshot

    async def follow(self) -> None:
        """Handles the worker's messages until it is gone."""
        with contextlib.suppress(ConnectionError):
            while True:
                message = await self._channel.receive()
                match message:
                    case Done(call=call) | Figures(call=call):
                        self._channel.answered(call, message)
                    case Listening():
                        self.listening.set()
                    case Scrape(call=call):
                        task = asyncio.create_task(self._page(call))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                    case _:
                        _log.warning("unexpected message %s", type(message).__name__)
        self._channel.close()

    async def _page(self, call: int) -> None:
        self._channel.send(Page(call, await self._hub.metrics()))

    def listen(self) -> None:
        """Tells the worker to accept connections."""
        self._channel.send(Listen())

    def drain(self) -> None:
        """Tells the worker to finish what runs, and end."""
        self._channel.send(Drain())


class Supervisor:
    """Several workers on one port."""

    def __init__(self, settings: Settings, hub: Hub, counters: Counters, host: str, port: int) -> None:
        self._settings = settings
        self._hub = hub
        self._counters = counters
        self._address = (host, port)
        self._links: dict[int, WorkerLink] = {}
        self._stopping = False
        self._listening = 0
        self.listening = asyncio.Event()
        """Every worker accepts connections."""

    async def run(self, index: int) -> None:
        """Runs one worker, again and again until the router stops."""
        failures = 0
        while not self._stopping:
            began = asyncio.get_running_loop().time()
            status = await self._run_once(index)
            self._counters.clear_worker(index)
            if self.stopped():
                return
            failures = 0 if asyncio.get_running_loop().time() - began > 60 else failures + 1
            _log.error("worker %d ended with status %s; it is started again", index, status)
            await asyncio.sleep(_RESTART_SECONDS[min(failures, len(_RESTART_SECONDS)) - 1])

    async def _run_once(self, index: int) -> int | None:
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self._counters.fd)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "modelfleet_serving.router.process",
            *map(str, descriptors),
            self._settings.log_level,
            "tls" if self._settings.tls_certificate else "plain",
            pass_fds=descriptors,
        )
        theirs.close()
        channel = await Channel.open(ours)
        link = self._links[index] = WorkerLink(channel, self._hub, process.kill)
        channel.send(Start(self._settings, *self._address, index))
        following = asyncio.create_task(link.follow())
        joining = asyncio.create_task(self._join(link))
        try:
            if self._stopping:
                link.drain()
            return await process.wait()
        finally:
            joining.cancel()
            following.cancel()
            channel.close()
            self._hub.leave(link)
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _join(self, link: WorkerLink) -> None:
        await self._hub.join(link)
        link.listen()
        await link.listening.wait()
        self._listening += 1
        if self._listening >= self._settings.workers:
            self.listening.set()

    def stopped(self) -> bool:
        """The router is about to end."""
        return self._stopping

    def drain(self) -> None:
        """Tells all workers to finish."""
        self._stopping = True
        for link in self._links.values():
            link.drain()


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket bound to the address and never listening: it keeps the port for the workers."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    reserved = socket.socket(family, kind, protocol)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(address)
    return reserved


@contextlib.asynccontextmanager
async def running(settings: Settings, hub: Hub, host: str, port: int) -> AsyncIterator[None]:
    """Workers that serve; on leaving, they drain first."""
    counters = hub.counters
    if settings.workers == 1:
        worker = Worker(settings, counters, asyncio.get_running_loop(), hub.metrics)
        await hub.join(worker)
        server = await worker.listen(host, port)
        try:
            yield
            await worker.drain(server)
        finally:
            server.close()
            await worker.close()
        return
    supervisor = Supervisor(settings, hub, counters, host, port)
    async with asyncio.TaskGroup() as group:
        for index in range(settings.workers):
            group.create_task(supervisor.run(index))
        await supervisor.listening.wait()
        try:
            yield
        finally:
            supervisor.drain()


def process_id() -> str:
    """Host name and process: unique among the routers of a cluster."""
    return f"{socket.gethostname()}-{os.getpid()}"
