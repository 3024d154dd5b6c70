"""Asks engines for the usage of a stream, and keeps it from clients that did not ask.

Interface::

    body, added = ask_usage(body, bytes(peek.stream_options))       # a streaming chat or completions request
    ...
    if added and may_hold_usage(data):                            # whole events, without chunk framing
        data = strip_usage(data)
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from modelfleet_serving.router.policy.events import data_of, events

_EMPTY: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_ASK: Final = b',"stream_options":{"include_usage":true}}'
_decode: Final = msgspec.json.decode
_encode: Final = msgspec.json.encode


class _Options(msgspec.Struct):
    include_usage: bool = False


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: dict[str, msgspec.Raw] | None = None


def ask_usage(body: bytes, stream_options: bytes) -> tuple[bytes, bool]:
    """``body`` so that the stream ends with its usage, and whether that was added.

    Args:
        body: A JSON object with at least one member, known to be valid.
        stream_options: Raw JSON of that member, empty when there is none.
    """
    if not stream_options:
        # The object's end is the last brace: nothing but white space may follow it.
        return body[: body.rindex(b"}")] + _ASK, True
    try:
        if _decode(stream_options, type=_Options | None) == _Options(include_usage=True):
            return body, False
        options = _decode(stream_options, type=dict[str, msgspec.Raw] | None) or {}
    except msgspec.ValidationError:
        return body, False  # the engine has a better message for it
    options["include_usage"] = msgspec.Raw(b"true")
    members = _decode(body, type=dict[str, msgspec.Raw])
    members["stream_options"] = msgspec.Raw(_encode(options))
    return _encode(members), True


def may_hold_usage(payload: bytes) -> bool:
    """Whether there may be an event for :func:`strip_usage`."""
    return _EMPTY.search(payload) is not None


def strip_usage(payload: bytes) -> bytes:
    """Whole events without those that have a usage and nothing else."""
    return b"".join(event for event in events(payload) if not _is_usage(event))


def _is_usage(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    try:
        decoded = _decode(data_of(event), type=_Event)
    except msgspec.DecodeError:
        return False
    return decoded.choices == [] and decoded.usage is not None
