"""Reads an engine's answer: its head, and where its body ends."""

from __future__ import annotations

from typing import Final

_DROP: Final = 1
_LENGTH: Final = 2
_TRANSFER: Final = 3
_CONNECTION: Final = 4
_TYPE: Final = 5
_PLAIN: Final = 6

# Hop-by-hop headers end here; the router speaks for itself with x-request-id, x-modelfleet-* and CORS.
_CODES: Final[dict[bytes, int]] = {
    b"content-length": _LENGTH,
    b"transfer-encoding": _TRANSFER,
    b"connection": _CONNECTION,
    b"content-type": _TYPE,
    b"date": _PLAIN,  # known so that nobody looks whether they are names
    b"server": _PLAIN,
    b"cache-control": _PLAIN,
    b"keep-alive": _DROP,
    b"proxy-connection": _DROP,
    b"proxy-authenticate": _DROP,
    b"te": _DROP,
    b"trailer": _DROP,
    b"upgrade": _DROP,
    b"x-request-id": _DROP,
    b"x-modelfleet-model": _DROP,
    b"x-modelfleet-variant": _DROP,
    b"x-modelfleet-replica": _DROP,
    b"x-modelfleet-fallback": _DROP,
    b"access-control-allow-origin": _DROP,
    b"access-control-allow-credentials": _DROP,
    b"access-control-expose-headers": _DROP,
}
_TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HEX_MARKS: Final = (b"x", b"X")
_ZERO: Final = 0x30
_MAX_DIGITS: Final = 15
"""Of a length or a chunk's size: what is larger doesn't fit every reader's integers."""
_MAX_SIZE_LINE: Final = 4096


class FramingError(Exception):
    """An engine's answer breaks HTTP/1.1."""


class ResponseHead:
    """Head of an answer.

    Attributes:
        lines: status line and end-to-end header lines, without the last line end.
        length: of the body in bytes, or -1 when it isn't given.
        chunked: the body comes in chunks.
        keep_alive: the connection may carry another request.
        events: the body is a stream of server-sent events.
    """

    __slots__ = ("chunked", "events", "keep_alive", "length", "lines", "status")

    def __init__(self, head: bytes) -> None:
        """Parses ``head``, which ends before its empty line."""
        lines = head.split(b"\r\n")
        first = lines[0]
        digits = first[9:12]
        if (
            first[:7] != b"HTTP/1."
            or first[8:9] != b" "
            or not digits.isdigit()
            or digits < b"100"
            or first[12:13] not in b" "
        ):
            raise FramingError(f"not an HTTP/1.1 status line: {first[:80]!r}")
        # A client may take a bare line end for one, and what is behind it for a header of ours.
        ends = len(lines) - 1
        if head.count(b"\n") != ends or head.count(b"\r") != ends or b"\0" in head:
            raise FramingError("a bare line end or NUL in the head")
        self.status = int(digits)
        self.length = -1
        self.chunked = self.events = False
        self.keep_alive = first[7:8] == b"1"
        if first[7:8] != b"1":
            first = b"HTTP/1.1" + first[8:]
        kept = [first]
        nominated: list[bytes] | None = None
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            code = _CODES.get(name.lower())
            if code == _PLAIN:
                kept.append(line)
            elif code is None:
                if not colon or not name or name.translate(None, _TOKEN):
                    raise FramingError(f"malformed header line: {line[:80]!r}")
                kept.append(line)
            elif code == _TYPE:
                self.events = value.lstrip()[:17].lower() == b"text/event-stream"
                kept.append(line)
            elif code == _CONNECTION:
                nominated = [token.strip() for token in value.lower().split(b",")]
            elif code != _DROP:
                self._take_framing(code, value.strip())
        if nominated is not None:
            kept = self._apply_connection(kept, nominated)
        self.lines = b"\r\n".join(kept)

    def _take_framing(self, code: int, value: bytes) -> None:
        if code == _TRANSFER:
            if value.lower() != b"chunked" or self.chunked:
                raise FramingError(f"unsupported transfer coding {value[:80]!r}")
            self.chunked = True
        elif (
            not value.isdigit()
            or len(value) > _MAX_DIGITS
            or (self.length >= 0 and self.length != int(value))
        ):
            raise FramingError(f"content-length {value[:80]!r}")
        else:
            self.length = int(value)
        if self.chunked and self.length >= 0:
            raise FramingError("both content-length and transfer-encoding")

    def _apply_connection(self, kept: list[bytes], nominated: list[bytes]) -> list[bytes]:
        if b"close" in nominated:
            self.keep_alive = False
        elif b"keep-alive" in nominated:
            self.keep_alive = True
        return [kept[0]] + [line for line in kept[1:] if line.partition(b":")[0].lower() not in nominated]


def _size_lines(longest: int) -> list[bytes]:
    lines = [b""] * (longest + 16)
    for size in range(1, longest):
        line = b"%x\r\n" % size
        lines[len(line) + size + 2] = line
    return [line or b"\0" for line in lines]  # no chunk is of such a length, and none begins so


_SIZE_LINES: Final = _size_lines(4096)


def is_one_chunk(data: bytes) -> bool:
    """Whether this is one whole chunk, as servers write them: its size in lower case, nothing beside it.

    The length of all of it leaves one size line only. ``False`` says nothing.
    """
    size = len(data)
    return size < len(_SIZE_LINES) and data.startswith(_SIZE_LINES[size]) and data.endswith(b"\r\n")


class ChunkScanner:
    """Follows the framing of a chunked body that is passed on as it is."""

    __slots__ = ("_left", "_partial", "_trailers")

    def __init__(self) -> None:
        self._left = 0  # of the current chunk, with its line end
        self._partial = b""
        self._trailers = False

    @property
    def at_boundary(self) -> bool:
        """Between two chunks: what was passed on so far is whole."""
        return self._left == 0 and not self._partial and not self._trailers

    def feed(self, data: bytes, out: list[bytes] | None = None) -> int:
        """Index behind the end of the body in ``data``, or -1 while it goes on.

        The chunks' contents are appended to ``out`` where it is given.
        """
        if self._partial:
            held = self._partial
            self._partial = b""
            end = self._scan(held + data, out)
            return end - len(held) if end >= 0 else -1
        return self._scan(data, out)

    def _scan(self, data: bytes, out: list[bytes] | None) -> int:
        position = 0
        size = len(data)
        left = self._left
        while not self._trailers:
            if left:
                take = position + left
                if left < 2 or data[take - 2 : take] != b"\r\n":
                    _check_chunk_end(data, position, take)
                if out is not None:
                    stop = min(take - 2, size)
                    if stop > position:
                        out.append(data[position:stop])
                if take > size:
                    self._left = take - size
                    return -1
                position = take
                self._left = 0
            if position == size:
                return -1
            end = data.find(b"\r\n", position)
            if end < 0:
                return self._hold(data[position:])
            length = _chunk_size(data[position:end])
            position = end + 2
            left = length + 2
            self._trailers = not length
        return self._end(data, position)

    def _end(self, data: bytes, position: int) -> int:
        """Finds the end of the trailers, which nearly always are none."""
        if data.startswith(b"\r\n", position):
            self._trailers = False
            return position + 2
        end = data.find(b"\r\n\r\n", position)
        if end < 0:
            return self._hold(data[position:])
        self._trailers = False
        _check_trailers(data[position:end])
        return end + 4

    def _hold(self, rest: bytes) -> int:
        if len(rest) > _MAX_SIZE_LINE:
            raise FramingError("a chunk's size line or trailers are too long")
        self._partial = rest
        return -1


def _check_chunk_end(data: bytes, position: int, take: int) -> None:
    """Checks as much of a chunk's line end, the two bytes before ``take``, as has come."""
    start = max(position, take - 2)
    if not b"\r\n"[2 - (take - start) :].startswith(data[start:take]):
        raise FramingError("a chunk doesn't end with CRLF")


def _check_trailers(trailers: bytes) -> None:
    for line in trailers.split(b"\r\n"):
        name, colon, _ = line.partition(b":")
        if not colon or not name or name.translate(None, _TOKEN) or b"\n" in line or b"\r" in line:
            raise FramingError(f"malformed trailer: {line[:80]!r}")


def _chunk_size(line: bytes) -> int:
    if not line.isalnum() or len(line) > _MAX_DIGITS or (line[0] == _ZERO and len(line) > 1):
        line = _digits(line)
    try:
        return int(line, 16)
    except ValueError:
        raise FramingError(f"chunk size {line[:40]!r}") from None


def _digits(line: bytes) -> bytes:
    """The digits of a size line that isn't just a few of them."""
    if b"\n" in line or b"\r" in line:
        raise FramingError("a bare line end in a chunk's size line")
    digits = line.partition(b";")[0].rstrip(b" \t")
    # int() would take 0x2, _ and signs as well.
    if not digits.isalnum() or len(digits) > _MAX_DIGITS or digits[1:2] in _HEX_MARKS:
        raise FramingError(f"chunk size {digits[:40]!r}")
    return digits
