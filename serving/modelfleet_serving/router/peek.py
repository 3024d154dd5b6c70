"""What routing needs to know of a JSON body; everything else passes unparsed."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from modelfleet_serving.router import wire
from modelfleet_serving.router.body import peek_json, replace_model

_find: Final = wire.peek
_encode: Final = msgspec.json.encode


class Peek:
    """Members of a body: the model's name, and raw JSON of others; empty of those that aren't there.

    Of a member that comes twice the last one counts, as in every reader that engines use.

    Attributes:
        model: ``None`` where it is missing or ``null``.
        span: where the JSON of the model stands in the body, -1 where that isn't known.
    """

    __slots__ = (
        "input",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "previous_response_id",
        "prompt",
        "span",
        "stream",
        "stream_options",
        "system",
        "tools",
    )

    def __init__(self, found: tuple[Any, ...]) -> None:
        """``found`` has the members as ``wire.peek`` returns them."""
        self.model: str | None = found[0]
        self.stream: Any = found[1]
        self.messages: Any = found[2]
        self.prompt: Any = found[3]
        self.input: Any = found[4]
        self.system: Any = found[5]
        self.tools: Any = found[6]
        self.stream_options: Any = found[7]
        self.previous_response_id: Any = found[8]
        self.max_tokens: Any = found[9]
        self.max_completion_tokens: Any = found[10]
        self.span: tuple[int, int] = found[11], found[12]


def peek(data: bytes, start: int = 0) -> Peek:
    """What a body says that ``data`` holds from ``start`` on.

    Raises:
        RequestError: 400 when it is not a JSON object or ``model`` is not a string.
    """
    if _find is not None:
        found = _find(data, start)
        if found is not None:
            return Peek(found)
    members = peek_json(memoryview(data)[start:] if start else data)
    raw: list[Any] = [
        members.stream,
        members.messages,
        members.prompt,
        members.input,
        members.system,
        members.tools,
        members.stream_options,
        members.previous_response_id,
        members.max_tokens,
        members.max_completion_tokens,
    ]
    return Peek((members.model, *(memoryview(value) if value else b"" for value in raw), -1, -1))


def rename(peeked: Peek, data: bytes, start: int, name: str) -> bytes:
    """The body that ``data`` holds from ``start`` on, with another model; every other byte stays."""
    first, last = peeked.span
    if first < 0:
        return replace_model(data[start:], name)
    view = memoryview(data)[start:]
    return b"".join((view[:first], _encode(name), view[last:]))
