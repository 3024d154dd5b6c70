"""Connections to addresses in numbers: opened without tasks. Names and TLS are the event loop's."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from modelfleet_serving.router.poller import READABLE, WRITABLE, SocketPoller, Watched

_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EINTR)
_CONNECTED: Final = (0, errno.EISCONN)


def family_of(host: str) -> int:
    """The family of an address in numbers; 0 for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return family
    return 0


class Opening(Watched):
    """A connection on its way to an address in numbers.

    There is nothing to do but to wait for one answer, so it takes no task: where many streams begin at once,
    tasks, futures and time-outs cost more than all else that opening a connection does. A neighbour on the
    same machine has answered before the call returns.
    """

    __slots__ = ("_address", "_loop", "_poller", "_socket", "_tell", "_timeout", "_timer", "_waits")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        poller: SocketPoller,
        family: int,
        address: tuple[str, int],
        timeout: float,
        tell: Callable[[socket.socket | None, str], None],
    ) -> None:
        """It begins with ``start``.

        Args:
            loop: runs what comes later.
            poller: says when there is an answer.
            family: of the address, by :func:`family_of`.
            address: host and port.
            timeout: seconds.
            tell: is called once unless it is cancelled: with a socket that doesn't block, or with why there
                is none. A failure is told after ``start`` has returned, never before.

        Raises:
            OSError: there is no socket to be had.
        """
        self._loop = loop
        self._poller = poller
        self._address = address
        self._tell = tell
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._waits = False
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Sends for the connection; it may be there at once."""
        self._socket.setblocking(False)
        code = self._socket.connect_ex(self._address)
        if code in _UNDER_WAY:
            code = self._socket.connect_ex(self._address)
        if code in _UNDER_WAY:
            self._waits = True
            self._poller.watch(self._socket.fileno(), self, 0, WRITABLE)
            self._timer = self._loop.call_later(self._timeout, self._late)
        elif code in _CONNECTED:
            self._done("")
        else:
            self._loop.call_soon(self._done, os.strerror(code))

    def on_event(self, mask: int) -> None:
        """There is an answer. What follows is the loop's, as are its faults."""
        code = self._socket.connect_ex(self._address) if mask & ~READABLE else errno.EALREADY
        if code not in _UNDER_WAY:
            self._rest()
            self._loop.call_soon(self._done, "" if code in _CONNECTED else os.strerror(code))

    def _late(self) -> None:
        self._timer = None
        self._rest()
        self._done(f"no connection within {self._timeout:g} s")

    def _rest(self) -> None:
        if self._waits:
            self._waits = False
            self._poller.watch(self._socket.fileno(), self, WRITABLE, 0)

    def _done(self, reason: str) -> None:
        if self._socket.fileno() < 0:
            return  # cancelled
        if self._timer is not None:
            self._timer.cancel()
        tell = self._tell
        self._tell = _told  # which mostly knows this opening: nothing is to wait for the collector
        if reason:
            self._socket.close()
            tell(None, reason)
        else:
            tell(self._socket, "")

    def cancel(self) -> None:
        """Gives up; nobody is told."""
        self._rest()
        if self._timer is not None:
            self._timer.cancel()
        self._tell = _told
        self._socket.close()


def _told(_connected: socket.socket | None, _reason: str) -> None:
    """Nobody waits any more."""
