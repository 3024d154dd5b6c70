"""Heads that came before on the same connection.

A client sends the same head with each request of a connection, and an engine with each answer: only the
number in ``content-length`` differs. Such a head is recognised byte by byte, and what the parser had found in
it holds again. Any other head, even by one byte, goes to the parser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.digits import read_digits
from modelfleet_serving.router.request import Request
from modelfleet_serving.router.response import ResponseHead

if TYPE_CHECKING:
    from modelfleet_serving.router.tenants import Tenant

_LENGTH: Final = b"\r\ncontent-length:"
_MAX_HEAD: Final = 4096
"""Bytes of a head that is worth keeping for a connection."""
_PATIENCE: Final = 16
"""Heads in a row that were all new, as each has an id or the like: then only one of 64 is looked at."""


class HeadPattern:
    """The bytes of a head around the digits of its ``content-length``.

    Attributes:
        end: of the head in the data that matched last.
        length: of its body.
    """

    __slots__ = ("_after", "_before", "_size", "_start", "end", "length")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self._after = after
        self._start = len(before)
        self._size = len(after)
        self.end = self.length = 0

    def match(self, data: bytes) -> bool:
        """Whether ``data`` begins with this head."""
        if not data.startswith(self._before):
            return False
        start = self._start
        length, stop = read_digits(data, start)
        # Spaces behind the digits belong to what must be equal.
        end = stop + self._size
        if stop == start or data[stop:end] != self._after:
            return False
        self.length = length
        self.end = end
        return True


def pattern_of(head: bytes) -> HeadPattern | None:
    """The pattern of a head that a parser has accepted, its empty line included; ``None`` for a rare form."""
    if len(head) > _MAX_HEAD:
        return None
    lower = head.lower()
    place = lower.find(_LENGTH)
    if place < 0 or lower.find(_LENGTH, place + 1) >= 0:
        return None
    start = place + len(_LENGTH)
    while head[start : start + 1] == b" ":
        start += 1
    stop = head.find(b"\r", start)
    if not head[start:stop].isdigit():
        return None
    return HeadPattern(head[:start], head[stop:])


class KnownRequest:
    """A request's head as the parser had found it, and the tenant that it named."""

    __slots__ = ("_joined", "_lines", "_tenant", "keys", "pattern", "request")

    def __init__(self, pattern: HeadPattern, request: Request, keys: int) -> None:
        """``keys`` is the generation of the API keys that named its tenant."""
        self.pattern = pattern
        self.request = request
        self.keys = keys
        self._lines = request.lines
        self._joined = b"".join(request.lines)
        self._tenant: Tenant | None = request.tenant

    def again(self, now: float) -> Request:
        """The request with this head that has just come; the one before must be over."""
        request = self.request
        request.received_at = now
        request.length = self.pattern.length
        request.lines = self._lines
        request.joined = self._joined
        request.tenant = self._tenant
        request.keep_alive = True
        request.size = request.wire = 0
        request.held = 0
        return request


def worth_knowing(request: Request) -> bool:
    """Whether the same head may come again and means the same then."""
    return (
        request.complete
        and request.length > 0
        and request.keep_alive
        and request.refusal is None
        and not (request.http10 or request.chunked or request.expects_continue or request.upgrade)
        and request.method == b"POST"
    )


class Curiosity:
    """Says whether a new head is worth a look."""

    __slots__ = ("_misses",)

    def __init__(self) -> None:
        self._misses = 0

    def satisfied(self) -> None:
        """A head came again."""
        self._misses = 0

    def piqued(self) -> bool:
        """A head was new."""
        self._misses += 1
        return self._misses <= _PATIENCE or not self._misses % 64


class KnownAnswers:
    """The head that an engine answered with last."""

    __slots__ = ("_curiosity", "_head", "_pattern")

    def __init__(self) -> None:
        self._pattern: HeadPattern | None = None
        self._head: ResponseHead | None = None
        self._curiosity = Curiosity()

    def find(self, data: bytes) -> tuple[ResponseHead, int] | None:
        """The head that ``data`` begins with, and where it ends; ``None`` when it isn't known."""
        pattern, head = self._pattern, self._head
        if pattern is None or head is None or not pattern.match(data):
            return None
        head.length = pattern.length
        self._curiosity.satisfied()
        return head, pattern.end

    def learn(self, raw: bytes, head: ResponseHead) -> None:
        """Keeps a head that was parsed from ``raw``."""
        if head.length <= 0 or head.status != 200 or not self._curiosity.piqued():
            return
        pattern = pattern_of(raw)
        if pattern is not None:
            self._pattern, self._head = pattern, head
