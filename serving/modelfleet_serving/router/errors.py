"""Error answers in the form that the caller's client library expects."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import msgspec

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES: Final = {404: "not_found_error", 413: "request_too_large", 502: "api_error"}
_encode = msgspec.json.Encoder().encode


class RequestError(Exception):
    """A request that is answered by the router itself, with an error.

    Attributes:
        status: HTTP status.
        message: for people.
        code: stable, for programs.
        param: the field of the request that it is about.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        headers: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.headers = headers

    def body(self, *, anthropic: bool = False) -> bytes:
        """JSON body: OpenAI's error object, or Anthropic's for its messages endpoint."""
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "api_error")
        if anthropic:
            return _encode(
                {
                    "type": "error",
                    "error": {"type": _ANTHROPIC_TYPES.get(self.status, kind), "message": self.message},
                }
            )
        return _encode(
            {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
        )

    def extra_headers(self) -> bytes:
        """Header lines beyond those of every answer."""
        if self.retry_after is None:
            return self.headers
        return self.headers + b"retry-after: %d\r\n" % max(1, -int(-self.retry_after // 1))


def error_object(status: int, body: bytes, *, anthropic: bool = False) -> bytes:
    """The JSON of an engine's error answer on one line, in the caller's form where it isn't already."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        return _encode(found)
    text = body[:1000].decode("utf-8", "replace").strip()
    message = f"the engine answered {status}" + (f": {text}" if text else "")
    return RequestError(status, message, code="engine_failed").body(anthropic=anthropic)


STATUS_LINES: Final[dict[int, bytes]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def status_line(status: int) -> bytes:
    """First line of an answer, with its line end."""
    return STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n".encode()
