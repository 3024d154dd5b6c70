"""Opens the data path's connections, and listens for them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from modelfleet_serving.router.poller import LoopPoller, Poller, SocketPoller
from modelfleet_serving.router.transport import SocketTransport

_log = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0
"""Without file descriptors or memory left, nothing is accepted for so long."""
_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def poller_of(loop: asyncio.AbstractEventLoop) -> SocketPoller:
    """What serves transports on this event loop."""
    own = getattr(loop, "poller", None)
    return own if isinstance(own, Poller) else LoopPoller(loop)


async def connect(
    loop: asyncio.AbstractEventLoop, poller: SocketPoller, host: str, port: int, protocol: Any
) -> None:
    """Connects a protocol to the first of a name's addresses that answers.

    Raises:
        OSError: none did.
        ValueError: the resolver can't encode the name.
    """
    failures: list[OSError] = []
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, number, _, address in found:
        connection = socket.socket(family, kind, number)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failures.append(error)
        except BaseException:
            connection.close()
            raise
        else:
            SocketTransport(loop, poller, connection, protocol)
            return
    if len(failures) == 1:
        raise failures[0]
    raise OSError("; ".join(map(str, failures)) or f"{host} has no address")


class Listener:
    """Listening sockets whose connections get a protocol each."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        poller: SocketPoller,
        sockets: Sequence[socket.socket],
        make: Callable[[], Any],
        backlog: int,
    ) -> None:
        self.sockets = tuple(sockets)
        self._loop = loop
        self._poller = poller
        self._make = make
        self._backlog = backlog
        self._closed = False
        for listening in self.sockets:
            self._begin(listening)

    @classmethod
    async def open(
        cls,
        loop: asyncio.AbstractEventLoop,
        poller: SocketPoller,
        make: Callable[[], Any],
        host: str,
        port: int,
        *,
        backlog: int,
    ) -> Listener:
        """Listens on all of a host's addresses; other processes may listen beside it (``SO_REUSEPORT``).

        Raises:
            OSError: an address is taken or isn't this machine's.
        """
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        try:
            for family, kind, number, _, address in dict.fromkeys(found):
                listening = socket.socket(family, kind, number)
                sockets.append(listening)
                listening.setblocking(False)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind(address)
                listening.listen(backlog)
        except OSError as error:
            for listening in sockets:
                listening.close()
            message = f"can't listen on {host}:{port}: {(error.strerror or str(error)).lower()}"
            raise OSError(error.errno, message) from error
        return cls(loop, poller, sockets, make, backlog)

    def _begin(self, listening: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listening.fileno(), self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(self._backlog):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _SCARCE:
                    raise
                _log.error("no connections are accepted for %g s: %s", _PAUSE_SECONDS, error)
                self._loop.remove_reader(listening.fileno())
                self._loop.call_later(_PAUSE_SECONDS, self._begin, listening)
                return
            connection.setblocking(False)
            try:
                SocketTransport(self._loop, self._poller, connection, self._make())
            except OSError:  # it was gone before it was taken
                connection.close()

    def close(self) -> None:
        """Accepts nothing more; connections stay."""
        if self._closed:
            return
        self._closed = True
        for listening in self.sockets:
            self._loop.remove_reader(listening.fileno())
            listening.close()

    async def wait_closed(self) -> None:
        """Nothing to wait for: for those who know ``asyncio.Server``."""
