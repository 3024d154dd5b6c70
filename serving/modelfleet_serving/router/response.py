"""Reads an engine's answer: its head, and where its body ends."""

from __future__ import annotations

from typing import Final

_DROP: Final = 1
_LENGTH: Final = 2
_TRANSFER: Final = 3
_CONNECTION: Final = 4
_TYPE: Final = 5

# Hop-by-hop headers end here; the router speaks for itself with x-request-id and x-modelfleet-*.
_CODES: Final[dict[bytes, int]] = {
    b"content-length": _LENGTH,
    b"transfer-encoding": _TRANSFER,
    b"connection": _CONNECTION,
    b"content-type": _TYPE,
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
}
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
        if first[:7] != b"HTTP/1." or not first[9:12].isdigit() or first[8:9] != b" ":
            raise FramingError(f"not an HTTP/1.1 status line: {first[:80]!r}")
        self.status = int(first[9:12])
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
            if code is None:
                if not colon or line[0] in b" \t":
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
            if value.lower() != b"chunked":
                raise FramingError(f"unsupported transfer coding {value[:80]!r}")
            self.chunked = True
        elif not value.isdigit() or (self.length >= 0 and self.length != int(value)):
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
                if out is not None:
                    stop = min(take - 2, size)
                    if stop > position:
                        out.append(data[position:stop])
                if take > size:
                    self._left = take - size
                    return -1
                if left >= 2 and data[take - 2 : take] != b"\r\n":
                    raise FramingError("a chunk doesn't end with CRLF")
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
        return end + 4

    def _hold(self, rest: bytes) -> int:
        if len(rest) > _MAX_SIZE_LINE:
            raise FramingError("a chunk's size line or trailers are too long")
        self._partial = rest
        return -1


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip()
    if not digits.isalnum() or len(digits) > 16:
        raise FramingError(f"chunk size {digits[:40]!r}")
    try:
        return int(digits, 16)
    except ValueError:
        raise FramingError(f"chunk size {digits[:40]!r}") from None
