"""What the data path has in C, where it is compiled; otherwise the standard library does it, or nobody.

System calls (``wire.c``) are for sockets that don't block. A call that would have to wait, or that a signal
interrupted, says so in its result; any other failure is an ``OSError``.

Shortcuts (``shortcut.c``): while one is open, the regular chunks of a stream go from an engine's socket to a
client's without coming here. Whatever is not regular, or can't be sent at once, ends it. What a client has
got is kept on tapes (``tape.c``).

And what is looked up and counted for each request: members of bodies (``peek.c``), blocks of prompts
(``hashing.c``), the table of prefixes (``prefixes.c``), sizes and usage (``sizes.c``), limits (``quota.c``).
The modules that use these do the same without C, and tests hold the two to the same results.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

compiled: Any = None
"""``wire.c`` as a module, where that is compiled."""
with contextlib.suppress(ImportError):
    from modelfleet_serving.router import _wire

    compiled = _wire

READ_BYTES: Final = 64 * 1024
MAX_PIECES: Final = 64
"""Sent with one call at most; the kernel's bound is 1,024."""
MAX_EVENTS: Final = 512


def receive_standard(fd: int, _expected: int, /) -> bytes | None:
    """:data:`receive` by the standard library."""
    try:
        return os.read(fd, READ_BYTES)
    except (BlockingIOError, InterruptedError):
        return None


def transmit_standard(fd: int, data: Buffer, /) -> int:
    """:data:`transmit` by the standard library."""
    try:
        return os.write(fd, data)
    except (BlockingIOError, InterruptedError):
        return 0


def transmit_pieces_standard(fd: int, pieces: Sequence[Buffer], /) -> int:
    """:data:`transmit_pieces` by the standard library."""
    try:
        return os.writev(fd, list(islice(pieces, MAX_PIECES)))
    except (BlockingIOError, InterruptedError):
        return 0


def waiter_standard(epoll: Any) -> Callable[[float], list[Any]]:
    """:func:`waiter` by the standard library."""

    def wait(seconds: float) -> list[Any]:
        return [number for event in epoll.poll(seconds, MAX_EVENTS) for number in event]

    return wait


def waiter(epoll: Any) -> Callable[[float], list[Any]]:
    """What waits for the next events of an epoll that stays open, and serves shortcuts meanwhile.

    It takes seconds, negative for any time, and returns file descriptor and what happened of each event in
    turn, of at most :data:`MAX_EVENTS`: none when the time is over, or a signal came. What happened is

    - an event mask, an ``int``;
    - ``bytes`` that were received for a shortcut, which they ended: they are not regular;
    - such bytes that were regular, and how many of them the sink has taken: a ``tuple``. They are counted and
      kept, and the shortcut has ended.

    Args:
        epoll: A ``select.epoll``.
    """
    return waiter_standard(epoll) if compiled is None else partial(compiled.wait_ready, epoll.fileno())


Shortcut: Final[Any] = compiled.Shortcut if compiled else None
"""Passes regular chunks of one stream on by itself: ``Shortcut(bounds, counts, kept, most)``.

``None`` without C.

Regular are whole chunks of HTTP, as servers write them, whose last one ends with an empty line, none of which
is the body's last or tells a usage; 16 KB at most in one read.

- ``open(source, sink, last)``: file descriptors, and when the last chunk went, in monotonic seconds. Needs a
  sink for which nothing waits to be written. A source has one shortcut at a time.
- ``close()``: may come any number of times.
- ``is_open``; ``pieces``: reads that were passed on; ``last``: when the last one was.

Args:
    bounds: upper ends of a histogram's buckets in seconds, an array of doubles.
    counts: one more than those, and the sum at the end: the time between two chunks is counted there.
    kept: a :data:`Tape` to which is appended what was passed on; ``None`` to keep nothing.
    most: bytes in ``kept`` with which it ends, so that somebody can look at them.
"""
Tape: Final[Any] = compiled.Tape if compiled else bytearray
"""What is appended to with ``+=`` and read with ``bytes()``, has a ``len()`` and can be ``clear()``-ed."""
receive: Final[Callable[[int, int], bytes | None]] = compiled.receive if compiled else receive_standard
"""What a socket has: ``None`` for nothing yet, ``b""`` for the end of the stream.

The second argument is how many bytes will probably come: a guess that makes much of them cheaper.
"""
transmit: Final[Callable[[int, Buffer], int]] = compiled.transmit if compiled else transmit_standard
"""Sends; returns how many bytes the socket took, 0 for none now."""
hash_blocks: Final[Any] = compiled.hash_blocks if compiled else None
"""``hash_blocks(data, size, seed, ends)``: hashes of :mod:`modelfleet_serving.router.policy.fingerprint`."""
readable_bytes: Final[Any] = compiled.readable_bytes if compiled else None
"""See :func:`~modelfleet_serving.router.policy.load.readable_bytes`."""
usual_usage: Final[Any] = compiled.usual_usage if compiled else None
"""Input and output tokens of the last usage, in the form in which most engines write it.

``None`` for none, an empty tuple for another form.
"""
charge: Final[Any] = compiled.charge if compiled else None
"""Charges a request to a tenant's row, for :mod:`modelfleet_serving.router.policy.quota`.

``charge(rates, charged, row, workers, worker, now, units, costs, lines)`` returns the header lines, or
``None`` when there is no room: then nothing was charged.
"""
Prefixes: Final[Any] = compiled.Prefixes if compiled else None
"""``Prefixes(memory)`` does what :class:`~modelfleet_serving.router.policy.prefix_table.PrefixTable` does."""
peek: Final[Callable[[bytes, int], tuple[Any, ...] | None] | None] = compiled.peek if compiled else None
"""The members of a JSON body that routing looks at. ``None`` without C.

It takes bytes and where the body begins in them, to their end. It returns what
:class:`modelfleet_serving.router.peek.Peek` is made of; ``None`` for a body that is not plain, which somebody
else has to read: one with a fault, without a model or with two, with escapes in its name or in a top-level
key, or nested in more than 64 levels.
"""
transmit_pieces: Final[Callable[[int, Sequence[Buffer]], int]] = (
    compiled.transmit_pieces if compiled else transmit_pieces_standard
)
"""Sends the first :data:`MAX_PIECES` pieces, in order, as one; returns how many bytes the socket took."""
