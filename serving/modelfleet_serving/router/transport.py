"""A TCP connection of the data path: a transport of asyncio that reads at once.

What it writes, and how it ends, is in :mod:`modelfleet_serving.router.sending`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final, TypeAlias

from modelfleet_serving.router import wire
from modelfleet_serving.router.poller import READABLE, WRITABLE, SocketPoller
from modelfleet_serving.router.sending import ByteProtocol, SendingSocket

_SLACK: Final = 4096
_receive: Final = wire.receive


class SocketTransport(SendingSocket):
    """One connected, non-blocking socket, with a protocol that is told what comes."""

    __slots__ = ("_expected", "_inlet", "_news_only", "_paused", "_shortcut", "_sink")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        poller: SocketPoller,
        connected: socket.socket,
        protocol: ByteProtocol | asyncio.Protocol,
    ) -> None:
        """Begins: the protocol gets ``connection_made``, then what comes.

        Args:
            loop: runs what comes later.
            poller: says when the socket is ready.
            connected: non-blocking; the transport closes it.
            protocol: is told.
        """
        super().__init__(loop, poller, connected, protocol)
        self._expected = 0  # bytes that the next read will probably bring
        self._paused = False  # reading is
        self._shortcut: Any = None  # what passes on what comes, and to whom
        self._sink: SocketTransport | None = None
        self._inlet: Any = None  # another's shortcut to here
        self._news_only = False  # the poller tells of what comes, not of what is there
        protocol.connection_made(self)  # type: ignore[arg-type]  # asyncio's don't know this transport
        if not self._paused and not self._closing:
            self._watch(READABLE)

    # --- Events ---

    def on_event(self, mask: int) -> None:
        """The socket is ready; errors and hang-ups are found by reading or writing."""
        if self._news_only:
            self._watch_again()
        if self._watched & READABLE and mask & ~WRITABLE:
            self._read()
        if self._watched & WRITABLE and mask & ~READABLE:
            try:
                self._flush()
            except Exception as error:  # noqa: BLE001  one connection's fault must not end the others
                self._broken(error)

    def _read(self) -> None:
        try:
            data = _receive(self._fd, self._expected)
        except OSError as error:
            self._end(error)
            return
        if data is None:
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            if data:
                size = len(data)
                # The next read will be much like this one; a little more, for a longer number or the like.
                self._expected = size + _SLACK if size > _SLACK else 0
                self._protocol.data_received(data)
                return
            self._watch(self._watched & ~READABLE)
            if not self._protocol.eof_received():
                self.close()
        except Exception as error:  # noqa: BLE001  one connection's fault must not end the others
            self._broken(error)

    # --- Shortcuts ---

    def pass_to(self, sink: ByteTransport, shortcut: Any, last: float) -> None:
        """Lets a shortcut pass on what comes, until either end has anything else to do.

        Args:
            sink: gets it; nothing happens when something waits to be written there.
            shortcut: a ``wire.Shortcut``.
            last: loop time of the chunk before.
        """
        if (
            not isinstance(sink, SocketTransport)
            or not self._poller.has_shortcuts
            or sink._poller is not self._poller
            or not sink._is_clear()
            or sink._closing
            or sink._ending
            or not self._watched & READABLE
        ):
            return
        self._shortcut = sink._inlet = shortcut
        self._sink = sink
        shortcut.open(self._fd, sink._fd, last)
        self._news_only = True
        self._poller.watch_news(self._fd)

    def _is_clear(self) -> bool:
        """Whether nothing waits to be written, once what was gathered is."""
        if self._gathered:
            self.flush()
        return not self._out_bytes

    def on_shortcut_end(self, what: Any) -> None:
        """Takes what a shortcut has received and did not pass on, or not all of it."""
        if self._news_only:
            self._watch_again()  # there may be more than was received
        if isinstance(what, bytes):
            if not self._closing:
                self._take(what)
            return
        data, sent = what
        sink = self._sink
        self._end_shortcuts()
        if sink is None or sink._closing:
            return
        try:
            sink._keep(memoryview(data)[sent:], len(data) - sent)
        except Exception as error:  # noqa: BLE001  one connection's fault must not end the others
            sink._broken(error)

    def _end_shortcuts(self) -> None:
        if self._shortcut is not None:
            self._shortcut.close()
            self._shortcut = self._sink = None
            if self._news_only:
                self._watch_again()
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None

    def _watch_again(self) -> None:
        self._news_only = False
        self._poller.watch_again(self._fd, self._watched)

    def _watch(self, mask: int) -> None:
        before = self._watched
        if mask != before:
            self._end_shortcuts()
            self._watched = mask
            self._poller.watch(self._fd, self, before, mask)

    # --- Reading ---

    def pause_reading(self) -> None:
        """The protocol wants nothing for now; the peer's end isn't noticed meanwhile."""
        self._paused = True
        self._watch(self._watched & ~READABLE)

    def resume_reading(self) -> None:
        """The protocol takes data again."""
        if self._paused and not self._closing:
            self._paused = False
            self._watch(self._watched | READABLE)


ByteTransport: TypeAlias = SocketTransport | asyncio.Transport
"""A transport of the data path's own, or an event loop's, which has TLS."""
