"""What a connection of the data path has to send, and its end: the half of a transport that writes.

It does what asyncio's transports of plain sockets do, in the same words, for one protocol that stays.
"""

from __future__ import annotations

import asyncio
import socket
from abc import abstractmethod
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from modelfleet_serving.router import wire
from modelfleet_serving.router.poller import READABLE, WRITABLE, SocketPoller, Watched

if TYPE_CHECKING:
    from modelfleet_serving.router.transport import ByteTransport

HIGH_WATER: Final = 64 * 1024
_LARGE: Final = 64 * 1024
"""Bytes that are worth a system call of their own."""
_transmit: Final = wire.transmit
_transmit_pieces: Final = wire.transmit_pieces


class ByteProtocol:
    """What a transport tells: asyncio's protocol, as a class whose methods compiled code calls directly."""

    __slots__ = ()

    def connection_made(self, transport: ByteTransport) -> None:
        """It has a connection."""

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""

    def eof_received(self) -> bool:
        """The peer sends no more. Returns whether the connection stays open for what is written."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""

    def pause_writing(self) -> None:
        """Much waits to be written."""

    def resume_writing(self) -> None:
        """Not much waits any more."""


class SendingSocket(Watched):
    """One connected, non-blocking socket, as far as it is written to.

    Writing tries the socket first, at once or with others that became ready with it, and keeps what it
    doesn't take; the protocol is told above a high-water mark (``pause_writing``). ``connection_lost`` comes
    later than the call that ended the connection.
    """

    __slots__ = (
        "_closing",
        "_ending",
        "_fd",
        "_full",
        "_gathered",
        "_high",
        "_loop",
        "_lost",
        "_low",
        "_out",
        "_out_bytes",
        "_poller",
        "_protocol",
        "_socket",
        "_watched",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        poller: SocketPoller,
        connected: socket.socket,
        protocol: ByteProtocol | asyncio.Protocol,
    ) -> None:
        """As of :class:`~modelfleet_serving.router.transport.SocketTransport`, but tells nobody."""
        self._loop = loop
        self._poller = poller
        self._socket = connected
        self._fd: Any = connected.fileno()  # an object: nearly every use is a call of C
        self._protocol: ByteProtocol | asyncio.Protocol = protocol
        self._out: deque[Any] = deque()
        self._out_bytes = 0
        self._watched = 0
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._full = False  # the protocol was told to pause
        self._gathered = False  # what waits to be written is about to be, with others'
        self._closing = False
        self._ending = False  # the peer is to see the end of the stream
        self._lost = False  # connection_lost is on its way
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __repr__(self) -> str:
        state = "lost" if self._lost else "closing" if self._closing else "open"
        return f"<{type(self).__name__} fd={self._fd} {state} {self._out_bytes} bytes to write>"

    @abstractmethod
    def _end_shortcuts(self) -> None:
        """Nothing may pass the protocol by any more."""

    @abstractmethod
    def _watch(self, mask: int) -> None:
        """Waits for this from now on: ``READABLE``, ``WRITABLE``, both or 0."""

    # --- Writing ---

    def write(self, data: bytes) -> None:
        """Sends, or keeps what the socket doesn't take.

        Raises:
            RuntimeError: after ``write_eof``.
        """
        if self._ending:
            raise RuntimeError("write after write_eof")
        if self._closing or not data:
            return
        size = len(data)
        if self._out_bytes:
            self._keep(data, size)
            return
        if self._poller.gathers and size < _LARGE:
            self._out.append(data)
            self._out_bytes = size
            self._gather()
            return
        try:
            sent = _transmit(self._fd, data)
        except OSError as error:
            self._end(error)
            return
        if sent < size:
            self._keep(memoryview(data)[sent:] if sent else data, size - sent)

    def writelines(self, pieces: list[bytes | memoryview]) -> None:
        """The same for several pieces, without joining them."""
        if self._ending:
            raise RuntimeError("write after write_eof")
        if self._closing:
            return
        sent = 0
        if not self._out_bytes:
            if self._poller.gathers:
                self._out.extend(pieces)
                self._out_bytes = sum(map(len, pieces))
                self._gather()
                return
            try:
                sent = _transmit_pieces(self._fd, pieces)
            except OSError as error:
                self._end(error)
                return
        for piece in pieces:
            size = len(piece)
            if sent >= size:
                sent -= size
            else:
                self._out.append(memoryview(piece)[sent:] if sent else piece)
                self._out_bytes += size - sent
                sent = 0
        if self._out_bytes:
            self._kept()

    def _keep(self, data: Any, size: int) -> None:
        self._out.append(data)
        self._out_bytes += size
        self._kept()

    def _kept(self) -> None:
        """Something waits to be written. The protocol is told last: it may end the connection."""
        if not self._gathered:
            self._watch(self._watched | WRITABLE)
        if not self._full and self._out_bytes > self._high:
            self._full = True
            self._protocol.pause_writing()

    def _gather(self) -> None:
        self._gathered = True
        self._poller.gather(self)

    def flush(self) -> None:
        """Writes what was gathered; what the socket doesn't take waits for it."""
        if not self._gathered:
            return
        self._gathered = False
        out = self._out
        try:
            # Nearly always it is one piece, which the socket takes.
            if len(out) == 1 and not (self._full or self._closing or self._ending):
                sent = _transmit(self._fd, out[0])
                if sent == self._out_bytes:
                    out.clear()
                    self._out_bytes = 0
                    return
                out[0] = memoryview(out[0])[sent:]
                self._out_bytes -= sent
            else:
                self._flush()
            if self._out_bytes:
                self._kept()
        except OSError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001  one connection's fault must not end the others
            self._broken(error)

    def _flush(self) -> None:
        """Writes what waits, as far as the socket takes it."""
        out = self._out
        while out:
            pieces = list(islice(out, wire.MAX_PIECES))
            try:
                sent = _transmit_pieces(self._fd, pieces)
            except OSError as error:
                self._end(error)
                return
            if not sent:
                break
            self._out_bytes -= sent
            short = False
            for piece in pieces:
                size = len(piece)
                if sent < size:
                    out[0] = memoryview(piece)[sent:]
                    short = True
                    break
                out.popleft()
                sent -= size
            if short:
                break
        if not out:
            self._watch(self._watched & ~WRITABLE)
            if self._closing:
                self._finish(None)
                return
            if self._ending:
                self._shut()
        if self._full and self._out_bytes <= self._low:
            self._full = False
            self._protocol.resume_writing()

    def can_write_eof(self) -> bool:
        """Always."""
        return True

    def write_eof(self) -> None:
        """Ends the stream to the peer once everything is written; reading goes on."""
        if self._ending or self._closing:
            return
        self._ending = True
        self._end_shortcuts()
        if not self._out_bytes:
            self._shut()

    def _shut(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._end(error)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Bytes above which the protocol is told to pause, and at which it may go on: a quarter of it."""
        self._high = HIGH_WATER if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be written."""
        return self._out_bytes

    # --- The end ---

    def is_closing(self) -> bool:
        """Whether it ends or has ended."""
        return self._closing

    def close(self) -> None:
        """Ends once everything is written; nothing more is read."""
        if self._closing:
            return
        self._closing = True
        self._end_shortcuts()
        self._watch(self._watched & ~READABLE)
        if not self._out_bytes:
            self._finish(None)

    def abort(self) -> None:
        """Ends now."""
        self._end(None)

    def _broken(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {
                "message": "a protocol of the data path failed",
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._closing = True
        self._out.clear()
        self._out_bytes = 0
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._end_shortcuts()
        self._watch(0)
        self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        protocol, self._protocol = self._protocol, _NOBODY
        try:
            protocol.connection_lost(error)
        finally:
            self._fd = -1  # the number may be another connection's soon
            self._socket.close()

    def get_extra_info(self, name: str, default: object = None) -> object:
        """``socket``, ``peername`` or ``sockname``, as asyncio's transports tell them."""
        try:
            match name:
                case "socket":
                    return self._socket
                case "peername":
                    return self._socket.getpeername()
                case "sockname":
                    return self._socket.getsockname()
        except OSError:  # the peer is gone
            return default
        return default


_NOBODY: Final = ByteProtocol()
