"""Reads of a request's body only what routing needs, and changes of it only the model's name."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from modelfleet_serving.router.errors import RequestError

MISSING: Final = msgspec.Raw(b"")
"""A member that isn't there."""


class Members(msgspec.Struct, gc=False):
    """The members of a JSON body that routing looks at; everything else is skipped unparsed."""

    model: str | None = None
    stream: msgspec.Raw = MISSING
    messages: msgspec.Raw = MISSING
    prompt: msgspec.Raw = MISSING
    input: msgspec.Raw = MISSING
    system: msgspec.Raw = MISSING
    tools: msgspec.Raw = MISSING
    stream_options: msgspec.Raw = MISSING
    previous_response_id: msgspec.Raw = MISSING
    max_tokens: msgspec.Raw = MISSING
    max_completion_tokens: msgspec.Raw = MISSING


_decode: Final = msgspec.json.Decoder(Members).decode

# One token of JSON that is known to be well-formed: a string, or a character that changes the structure.
_TOKEN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]', re.DOTALL)
_QUOTE: Final = 0x22
_COLON: Final = 0x3A

_BOUNDARY: Final = re.compile(rb'(?:^|;)\s*boundary=(?:"([^"\r\n]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE)
_DISPOSITION: Final = re.compile(rb"^content-disposition:\s*form-data\s*(.*)$", re.IGNORECASE | re.MULTILINE)
_PARAMETER: Final = re.compile(rb';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')
_MAX_PARTS: Final = 256


def peek_json(body: bytes | memoryview) -> Members:
    """The routing members of a JSON body.

    Raises:
        RequestError: 400 when the body is not a JSON object or ``model`` is not a string.
    """
    if not body:
        raise RequestError(400, "the request has no body; a JSON object is expected", code="invalid_json")
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        param = "model" if "$.model" in str(error) else None
        raise RequestError(
            400, f"the request body is invalid: {error}", code="invalid_body", param=param
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(
            400, f"the request body is not valid JSON: {error}", code="invalid_json"
        ) from error


def replace_model(body: bytes, name: str) -> bytes:
    """``body`` with the value of its top-level ``model`` replaced; every other byte stays.

    ``body`` must have passed :func:`peek_json`. Of a repeated key the last one counts, as in every JSON
    reader that engines use.
    """
    return _replace(body, "model", msgspec.json.encode(name))


def _replace(body: bytes, key: str, value: bytes) -> bytes:
    start, end = _member_span(body, key)
    return b"".join((body[:start], value, body[end:]))


def _member_span(body: bytes, name: str) -> tuple[int, int]:
    """Where the value of a top-level member stands; of several the last one."""
    depth = 0
    expects_key = False
    start = -1
    inside = False
    span = (-1, -1)
    for match in _TOKEN.finditer(body):
        token = body[match.start()]
        if token == _QUOTE:
            if depth == 1 and expects_key:
                expects_key = False
                inside = _is_key(match[0], name)
        elif token in b"{[":
            depth += 1
            expects_key = depth == 1
        elif token in b"}]":
            depth -= 1
            if depth == 0 and inside:
                span = (start, match.start())
        elif depth == 1:
            if token == _COLON:
                start = match.end()
            else:
                if inside:
                    span = (start, match.start())
                expects_key, inside = True, False
    return _trimmed(body, span)


def _is_key(token: bytes, name: str) -> bool:
    if b"\\" in token:
        return bool(msgspec.json.decode(token) == name)
    return token[1:-1] == name.encode()


def _trimmed(body: bytes, span: tuple[int, int]) -> tuple[int, int]:
    start, end = span
    value = body[start:end]
    return start + len(value) - len(value.lstrip()), end - len(value) + len(value.rstrip())


def multipart_model(body: bytes, content_type: bytes) -> tuple[int, int]:
    """Span of the form field ``model``'s value in a ``multipart/form-data`` body.

    Raises:
        RequestError: 400 when the body is not such a form or has no such field.
    """
    if not content_type.lower().startswith(b"multipart/form-data"):
        raise RequestError(400, "content-type must be multipart/form-data", code="invalid_content_type")
    found = _BOUNDARY.search(content_type[len(b"multipart/form-data") :])
    if found is None:
        raise RequestError(400, "content-type names no multipart boundary", code="invalid_content_type")
    delimiter = b"--" + (found[1] or found[2])
    position = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter)
    if position < 0:
        raise RequestError(400, "the multipart boundary does not occur in the body", code="invalid_multipart")
    position += len(delimiter) if position == 0 else len(delimiter) + 2
    span: tuple[int, int] | None = None
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", position):
            if span is None:
                raise RequestError(
                    400, "the form has no field named model", code="missing_model", param="model"
                )
            return span
        head_end = body.find(b"\r\n\r\n", position)
        part_end = body.find(b"\r\n" + delimiter, position)
        if head_end < 0 or part_end < 0 or part_end < head_end:
            raise RequestError(400, "the multipart body is cut off", code="invalid_multipart")
        if _field_name(body[position:head_end]) == b"model":
            span = (head_end + 4, part_end)
        position = part_end + len(delimiter) + 2
    raise RequestError(400, f"the form has more than {_MAX_PARTS} parts", code="invalid_multipart")


def _field_name(part_head: bytes) -> bytes | None:
    disposition = _DISPOSITION.search(part_head)
    if disposition is None:
        return None
    for name, quoted, plain in _PARAMETER.findall(disposition[1]):
        if name.lower() == b"name":
            return bytes(quoted or plain)
    return None
