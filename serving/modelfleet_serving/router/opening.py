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

    __slots__ = (
        "_address",
        "_family",
        "_loop",
        "_poller",
        "_socket",
        "_tell",
        "_timeout",
        "_timer",
        "_waits",
    )

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
        """
        self._loop = loop
        self._poller = poller
        self._address = address
        self._tell = tell
        self._family = family
        self._socket: socket.socket | None = None  # after the end, too
        self._waits = False
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Sends for the connection; it may be there at once."""
        try:
            code = self._begin()
        except OSError as error:  # no socket to be had, or none that can be watched
            code = error.errno or errno.EIO
        if code in _CONNECTED:
            self._done("")
        elif code not in _UNDER_WAY:
            self._loop.call_soon(self._done, os.strerror(code))

    def _begin(self) -> int:
        opened = self._socket = socket.socket(self._family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        opened.setblocking(False)
        code = opened.connect_ex(self._address)
        if code in _UNDER_WAY:
            code = opened.connect_ex(self._address)
        if code in _UNDER_WAY:
            self._poller.watch(opened.fileno(), self, 0, WRITABLE)
            self._waits = True
            self._timer = self._loop.call_later(self._timeout, self._late)
        return code

    def on_event(self, mask: int) -> None:
        """There is an answer. What follows is the loop's, as are its faults."""
        if self._socket is None or not mask & ~READABLE:
            return
        code = self._socket.connect_ex(self._address)
        if code not in _UNDER_WAY:
            self._rest()
            self._loop.call_soon(self._done, "" if code in _CONNECTED else os.strerror(code))

    def _late(self) -> None:
        self._rest()
        self._done(f"no connection within {self._timeout:g} s")

    def _rest(self) -> None:
        """Waits for nothing more."""
        if self._waits and self._socket is not None:
            self._waits = False
            self._poller.watch(self._socket.fileno(), self, WRITABLE, 0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _done(self, reason: str) -> None:
        tell, opened = self._tell, self._socket
        self._tell = _told  # which mostly knows this opening: nothing is to wait for the collector
        self._socket = None
        if not reason:
            tell(opened, "")
            return
        if opened is not None:
            opened.close()
        tell(None, reason)

    def cancel(self) -> None:
        """Gives up; nobody is told."""
        self._rest()
        self._tell = _told
        self._done("cancelled")


def _told(_connected: socket.socket | None, _reason: str) -> None:
    """Nobody waits any more."""
