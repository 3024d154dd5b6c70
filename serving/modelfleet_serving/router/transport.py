"""A TCP connection of the data path: a transport of asyncio that writes at once.

It does what asyncio's transports of plain sockets do, in the same words, for one protocol that stays.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from itertools import islice
from typing import Any, Final, TypeAlias

from modelfleet_serving.router import wire
from modelfleet_serving.router.poller import READABLE, WRITABLE, SocketPoller

HIGH_WATER: Final = 64 * 1024
_SLACK: Final = 4096
_LARGE: Final = 64 * 1024
"""Bytes that are worth a system call of their own."""
_receive: Final = wire.receive
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


class SocketTransport:
    """One connected, non-blocking socket.

    Writing tries the socket first, at once or with others that became ready with it, and keeps what it
    doesn't take; the protocol is told above a high-water mark (``pause_writing``). ``connection_lost`` comes
    later than the call that ended the connection.
    """

    __slots__ = (
        "_closing",
        "_ending",
        "_expected",
        "_fd",
        "_full",
        "_gathered",
        "_high",
        "_inlet",
        "_loop",
        "_lost",
        "_low",
        "_news_only",
        "_out",
        "_out_bytes",
        "_paused",
        "_poller",
        "_protocol",
        "_shortcut",
        "_sink",
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
        """Begins: the protocol gets ``connection_made``, then what comes.

        Args:
            loop: runs what comes later.
            poller: says when the socket is ready.
            connected: non-blocking; the transport closes it.
            protocol: is told.
        """
        self._loop = loop
        self._poller = poller
        self._socket = connected
        self._fd: Any = connected.fileno()  # an object: nearly every use is a call of C
        self._protocol: ByteProtocol | asyncio.Protocol = protocol
        self._out: deque[Any] = deque()
        self._out_bytes = 0
        self._watched = 0
        self._expected = 0  # bytes that the next read will probably bring
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._full = False  # the protocol was told to pause
        self._gathered = False  # what waits to be written is about to be, with others'
        self._paused = False  # reading is
        self._closing = False
        self._ending = False  # the peer is to see the end of the stream
        self._lost = False  # connection_lost is on its way
        self._shortcut: Any = None  # what passes on what comes, and to whom
        self._sink: SocketTransport | None = None
        self._inlet: Any = None  # another's shortcut to here
        self._news_only = False  # the poller tells of what comes, not of what is there
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        protocol.connection_made(self)  # type: ignore[arg-type]  # asyncio's don't know this transport
        if not self._paused and not self._closing:
            self._watch(READABLE)

    def __repr__(self) -> str:
        state = "lost" if self._lost else "closing" if self._closing else "open"
        return f"<SocketTransport fd={self._fd} {state} {self._out_bytes} bytes to write>"

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

    # --- Writing ---

    def _is_clear(self) -> bool:
        """Whether nothing waits to be written, once what was gathered is."""
        if self._gathered:
            self.flush()
        return not self._out_bytes

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
ByteTransport: TypeAlias = SocketTransport | asyncio.Transport
"""A transport of the data path's own, or an event loop's, which has TLS."""
