"""A client's request as the parser hands it over: what routing needs, and what passes through."""

from __future__ import annotations

from typing import Final

from modelfleet_serving.contract import (
    HEADER_FALLBACK,
    HEADER_KEEP_ALIVE,
    HEADER_MODEL,
    HEADER_PRIORITY,
    HEADER_REPLICA,
    HEADER_REQUEST_ID,
    HEADER_SESSION,
    HEADER_TIMEOUT,
    HEADER_VARIANT,
)
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.tenants import Tenant

_DROP: Final = 1
_LENGTH: Final = 3
_TRANSFER: Final = 4
_CONNECTION: Final = 5
_EXPECT: Final = 6
_UPGRADE: Final = 7
_KEEP: Final = 8
_TAKE: Final = 9
_STEER: Final = 10
_STEER_KEEP: Final = 11

# Headers that mean something to the router. Hop-by-hop ones end here; _TAKE and _STEER ones are the router's
# own.
HEADER_CODES: Final[dict[bytes, int]] = {
    b"host": _TAKE,
    b"content-length": _LENGTH,
    b"transfer-encoding": _TRANSFER,
    b"connection": _CONNECTION,
    b"expect": _EXPECT,
    b"upgrade": _UPGRADE,
    b"keep-alive": _DROP,
    b"proxy-connection": _DROP,
    b"proxy-authorization": _DROP,
    b"te": _DROP,
    b"trailer": _DROP,
    b"http2-settings": _DROP,
    b"content-type": _KEEP,
    b"content-encoding": _KEEP,
    b"origin": _KEEP,
    b"authorization": _TAKE,
    b"x-api-key": _TAKE,
    b"access-control-request-headers": _TAKE,
    b"traceparent": _KEEP,
    HEADER_REQUEST_ID.encode(): _STEER,
    HEADER_MODEL.encode(): _STEER,
    HEADER_VARIANT.encode(): _STEER,
    HEADER_PRIORITY.encode(): _STEER,
    HEADER_TIMEOUT.encode(): _STEER,
    HEADER_KEEP_ALIVE.encode(): _STEER,
    HEADER_SESSION.encode(): _STEER_KEEP,
    HEADER_REPLICA.encode(): _DROP,
    HEADER_FALLBACK.encode(): _DROP,
}
_ONCE: Final = frozenset({b"host", b"content-type", b"authorization", HEADER_REQUEST_ID.encode()})
MAX_REQUEST_ID: Final = 200


class Request:
    """One request.

    Attributes:
        target: path and query as sent, in origin form.
        lines: end-to-end headers as alternating name, separator, value and line end.
        joined: the same in one piece, where that is known.
        special: values of the headers the router knows, by lower-case name.
        data: holds the body, which begins at ``start``.
        length: of the body as announced, -1 when it comes in chunks.
        size: of the body that has come so far.
        wire: bytes that have come of it all, framing included.
        held: bytes of it that count against the worker's limit.
    """

    method = b""
    target = b""
    path = b""
    query = b""
    http10 = False
    keep_alive = True
    length = 0
    chunked = False
    expects_continue = False
    upgrade = b""
    upgrades = False
    complete = False
    size = 0
    wire = 0
    held = 0
    joined = b""
    steered = False
    """Has a header that is meant for the router, beside its credentials."""
    tenant: Tenant | None = None
    refusal: RequestError | None = None
    """Why it is not to be served; said once its body is read."""

    def __init__(self, received_at: float) -> None:
        self.received_at = received_at
        self.lines: list[bytes] = []
        self.special: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []
        self.nominated: list[bytes] = []
        self.data = b""
        self.start = 0
        self._view: memoryview | None = None

    @property
    def body(self) -> bytes:
        """The whole body, once it is complete."""
        if self.start:
            self.body = self.data[self.start :]
        return self.data

    @body.setter
    def body(self, body: bytes) -> None:
        self.data = body
        self.start = 0
        self._view = None

    @property
    def payload(self) -> bytes | memoryview:
        """The same, without copying what is large."""
        view = self._view
        return self.data if view is None else view

    def take_body(self, data: bytes, start: int) -> None:
        """Takes a body that came in one piece with its head: all of ``data`` from ``start`` on."""
        self.data = data
        self.start = start
        self._view = memoryview(data)[start:]

    def take_header(self, code: int, key: bytes, name: bytes, value: bytes) -> None:
        """Takes a header that the router knows.

        Raises:
            RequestError: 400 when it contradicts HTTP/1.1 or an earlier header.
        """
        if code >= _KEEP:
            if key in self.special and key in _ONCE:
                raise RequestError(400, f"the header {key.decode()} occurs twice", code="invalid_header")
            self.special[key] = value
            if code == _STEER:
                self.steered = True
            elif code != _TAKE:
                self.steered |= code == _STEER_KEEP
                self.lines += (name, b": ", value, b"\r\n")
        elif code == _LENGTH:
            self.length = int(value)  # the parser refuses anything but digits, and a second one
        elif code == _CONNECTION:
            self.nominated += [token.strip() for token in value.lower().split(b",")]
        elif code == _TRANSFER:
            if self.chunked or value.strip().lower() != b"chunked":
                raise RequestError(400, "the only transfer coding is chunked", code="invalid_header")
            self.chunked = True
            self.length = -1
        elif code == _EXPECT:
            if value.strip().lower() != b"100-continue":
                raise RequestError(417, "the only expectation is 100-continue", code="invalid_header")
            self.expects_continue = True
        elif code == _UPGRADE:
            self.upgrade = value.strip().lower()

    def finish_head(self, method: str, version: str, *, upgrades: bool) -> None:
        """Checks the head as a whole and splits the target.

        Raises:
            RequestError: 400 or 505.
        """
        self.method = method.encode("ascii")
        if version != "1.1":
            if version != "1.0":
                raise RequestError(505, f"HTTP/{version} is not supported", code="http_version")
            self.http10 = True
            self.keep_alive = b"keep-alive" in self.nominated
            if self.chunked:
                raise RequestError(400, "HTTP/1.0 knows no transfer-encoding", code="invalid_header")
        elif b"host" not in self.special:
            raise RequestError(400, "HTTP/1.1 needs a host header", code="invalid_header")
        if self.nominated:
            self._apply_connection()
        self.upgrades = upgrades
        target = self.target
        if not target.startswith(b"/") and target != b"*":
            self.target = target = _origin_form(target)
        self.path, _, self.query = target.partition(b"?")

    def _apply_connection(self) -> None:
        if b"close" in self.nominated:
            self.keep_alive = False
        ordinary = set(self.nominated) - {b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""}
        if not ordinary:
            return
        lines = self.lines
        self.lines = [
            part
            for start in range(0, len(lines), 4)
            if lines[start].lower() not in ordinary
            for part in lines[start : start + 4]
        ]
        for name in ordinary:
            self.special.pop(name, None)

    def drop_line(self, name: bytes) -> None:
        """Takes a header off those that pass through."""
        lines = self.lines
        for start in range(0, len(lines), 4):
            if lines[start].lower() == name:
                self.lines = lines[:start] + lines[start + 4 :]
                self.joined = b""
                return

    def text(self, name: str) -> str | None:
        """Value of a known header as text."""
        value = self.special.get(name.encode())
        return None if value is None else value.strip().decode("latin-1")


def _origin_form(target: bytes) -> bytes:
    scheme, colon, rest = target.partition(b"://")
    if not colon or scheme.lower() not in (b"http", b"https"):
        raise RequestError(400, "the request target must be a path", code="invalid_target")
    _, slash, path = rest.partition(b"/")
    return b"/" + path if slash else b"/"
