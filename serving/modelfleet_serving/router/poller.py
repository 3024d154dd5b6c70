"""Which sockets are ready: the data path's are served where they are found, others are the event loop's.

asyncio makes a handle of every event, puts it into a queue and runs it from there, in its context. For
sockets that carry streams, where an event is 200 bytes, that costs as much as all the rest. So a
:class:`Poller` calls the transport of such a socket on the spot, and gives only other sockets' events to the
loop. It goes on as long as there is nothing to do for the loop: no callback scheduled, no timer due.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import TYPE_CHECKING, Any, Final

from modelfleet_serving.router import wire

if TYPE_CHECKING:
    from modelfleet_serving.router.sending import SendingSocket

# epoll's masks, which are poll's: the same names on systems that have no epoll.
READABLE: Final = 0x01
WRITABLE: Final = 0x04
_NEWS: Final = READABLE | 0x2000 | 0x8000_0000
"""``EPOLLIN | EPOLLRDHUP | EPOLLET``."""
_GATHERED: Final = 8
"""Writes that wait for each other at most, so that the first is not late."""
_monotonic: Final = time.monotonic


class Watched(ABC):
    """What is told by a poller that its socket is ready."""

    __slots__ = ()

    @abstractmethod
    def on_event(self, mask: int) -> None:
        """The socket is ready, as epoll's mask says; it may have failed, too."""

    def on_shortcut_end(self, what: Any) -> None:  # noqa: B027  most have none
        """Takes what a shortcut has received and did not pass on: ``wire.waiter`` says what it may be."""


class SocketPoller(ABC):
    """What tells transports that their sockets are ready.

    Attributes:
        has_shortcuts: sockets may be tied to each other with ``wire.Shortcut``.
        gathers: several sockets are being served: what is to be written may be gathered with :meth:`gather`.
    """

    def __init__(self, *, has_shortcuts: bool) -> None:
        self.has_shortcuts = has_shortcuts
        self.gathers = False

    @abstractmethod
    def watch(self, fd: int, watched: Watched, before: int, after: int) -> None:
        """Changes what somebody waits for: ``READABLE``, ``WRITABLE``, both or 0."""

    @abstractmethod
    def watch_news(self, fd: int) -> None:
        """Lets a watched socket be told of only when something comes, until :meth:`watch_again`.

        That saves the kernel a look at each socket that was just read empty, as shortcuts read them.
        """

    @abstractmethod
    def watch_again(self, fd: int, mask: int) -> None:
        """Lets a socket be told of as long as it is ready, as before."""

    @abstractmethod
    def gather(self, transport: SendingSocket) -> None:
        """Calls a transport's ``flush`` soon, together with others'."""


class Poller(SocketPoller):
    """A selector for asyncio's event loop that serves the data path's sockets itself. Needs Linux.

    Attributes:
        woken: something was scheduled on the loop since it last looked; the loop sets it.
    """

    def __init__(self) -> None:
        super().__init__(has_shortcuts=True)
        self.woken = False
        self._gathered: list[SendingSocket] = []
        self._epoll: Any = select.epoll()  # type: ignore[attr-defined,unused-ignore]
        self._wait = wire.waiter(self._epoll)
        self._watched: dict[int, Watched] = {}
        self._keys: dict[int, SelectorKey] = {}

    def watch(self, fd: int, watched: Watched, before: int, after: int) -> None:
        """Changes what somebody waits for, by one call of the kernel."""
        if not before:
            self._epoll.register(fd, after)
            self._watched[fd] = watched
        elif after:
            self._epoll.modify(fd, after)
        else:
            del self._watched[fd]
            self._epoll.unregister(fd)

    def watch_news(self, fd: int) -> None:
        """By one call of the kernel, too; what is there already is told."""
        self._epoll.modify(fd, _NEWS)

    def watch_again(self, fd: int, mask: int) -> None:
        """Likewise."""
        self._epoll.modify(fd, mask)

    def gather(self, transport: SendingSocket) -> None:
        """Calls a transport's ``flush`` once the sockets that are ready are served, or some of them.

        Whoever waits for one of several writes wakes up once, and finds the others when it looks. Waking a
        process costs the writer as much as the write, on a virtual machine more.
        """
        self._gathered.append(transport)
        if len(self._gathered) >= _GATHERED:
            self._flush()

    def _flush(self) -> None:
        gathered = self._gathered
        self._gathered = []
        for transport in gathered:
            transport.flush()

    # --- What asyncio asks of a selector ---

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Serves transports until there is something for the loop, or the time is over.

        Args:
            timeout: seconds; ``None`` for any time, at most 0 for not at all.
        """
        self.woken = False
        wait = -1.0 if timeout is None else max(0.0, timeout)
        until = 0.0 if timeout is None else _monotonic() + wait
        ready: list[tuple[SelectorKey, int]] = []
        while True:
            events: list[Any] = self._wait(wait)
            self.gathers = len(events) > 2
            for index in range(0, len(events), 2):
                fd: Any = events[index]  # an object: it is a key
                what = events[index + 1]
                watched = self._watched.get(fd)
                if not isinstance(what, int):
                    if watched is not None:  # else an event before this one has ended it
                        watched.on_shortcut_end(what)
                elif watched is not None:
                    watched.on_event(what)
                else:
                    self._add(fd, what, ready)
            self.gathers = False
            if self._gathered:
                self._flush()
            if ready or self.woken or not events:
                return ready
            if timeout is not None:
                wait = until - _monotonic()
                if wait <= 0:
                    return ready

    def _add(self, fd: int, mask: int, ready: list[tuple[SelectorKey, int]]) -> None:
        key = self._keys.get(fd)
        if key is None:
            return  # closed by an event before this one
        found = 0
        if mask & ~READABLE:
            found |= EVENT_WRITE
        if mask & ~WRITABLE:
            found |= EVENT_READ
        found &= key.events
        if found:
            ready.append((key, found))

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        """Begins to watch a file for the loop.

        Raises:
            KeyError: when it is watched already.
        """
        fd = _number(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is already registered")
        key = SelectorKey(fileobj, fd, events, data)
        self._epoll.register(fd, _mask(events))
        self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> SelectorKey:
        """Ends watching a file.

        Raises:
            KeyError: when it is not watched.
        """
        key = self._keys.pop(_number(fileobj))
        with contextlib.suppress(OSError):  # closed before: the kernel has forgotten it by itself
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        """Changes what a file is watched for, or what belongs to it.

        Raises:
            KeyError: when it is not watched.
        """
        key = self._keys[_number(fileobj)]
        if events != key.events:
            self._epoll.modify(key.fd, _mask(events))
        changed = SelectorKey(key.fileobj, key.fd, events, data)
        self._keys[key.fd] = changed
        return changed

    def get_key(self, fileobj: Any) -> SelectorKey:
        """A watched file's key.

        Raises:
            KeyError: when it is not watched.
        """
        return self._keys[_number(fileobj)]

    def get_map(self) -> Mapping[Any, SelectorKey]:
        """Keys by file descriptor."""
        return self._keys

    def close(self) -> None:
        """Ends."""
        self._keys.clear()
        self._watched.clear()
        self._epoll.close()


class LoopPoller(SocketPoller):
    """The same for transports on any other event loop, through ``add_reader`` and ``add_writer``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(has_shortcuts=False)
        self._loop = loop

    def watch_news(self, fd: int) -> None:
        """Makes no difference here: there are no shortcuts."""

    def watch_again(self, fd: int, mask: int) -> None:
        """Makes no difference here."""

    def gather(self, transport: SendingSocket) -> None:
        """Flushes at once."""
        transport.flush()

    def watch(self, fd: int, watched: Watched, before: int, after: int) -> None:
        """Changes what the loop calls it for."""
        changed = before ^ after
        if changed & READABLE:
            if after & READABLE:
                self._loop.add_reader(fd, watched.on_event, READABLE)
            else:
                self._loop.remove_reader(fd)
        if changed & WRITABLE:
            if after & WRITABLE:
                self._loop.add_writer(fd, watched.on_event, WRITABLE)
            else:
                self._loop.remove_writer(fd)


def _number(fileobj: Any) -> int:
    number: int = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    return number


def _mask(events: int) -> int:
    mask = 0
    if events & EVENT_READ:
        mask |= READABLE
    if events & EVENT_WRITE:
        mask |= WRITABLE
    return mask
