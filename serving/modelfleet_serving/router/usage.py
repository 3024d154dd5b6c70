"""Token counts from an engine's answer, without parsing it."""

from __future__ import annotations

import re
from typing import Any, Final

from modelfleet_serving.router import wire
from modelfleet_serving.router.digits import read_digits

KEY: Final = b'"usage"'
"""Inside a JSON string its quotes would be escaped: bytes with this are a member's name, or a bare string."""
_OBJECT: Final = re.compile(rb'"usage"\s*:\s*\{')
_INPUT: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_OUTPUT: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
# As most engines write it. Where it is written otherwise, the patterns look for it.
_PROMPT: Final = b'"usage":{"prompt_tokens":'
_TOTAL: Final = b',"total_tokens":'
_COMPLETION: Final = b',"completion_tokens":'
_PROMPT_SIZE: Final = len(_PROMPT)
_TOTAL_SIZE: Final = len(_TOTAL)
_COMPLETION_SIZE: Final = len(_COMPLETION)


def read_usage(data: bytes) -> tuple[int, int] | None:
    """Input and output tokens of the last usage object in ``data``, of OpenAI's or Anthropic's form."""
    if wire.usual_usage is not None:
        usual: Any = wire.usual_usage(data)
        if usual is None:
            return None
        if usual:
            return usual[0], usual[1]
    place = data.rfind(KEY)
    if place < 0:
        return None
    start = place + _PROMPT_SIZE
    if data[place:start] == _PROMPT:
        read, end = read_digits(data, start)
        if data[end : end + _TOTAL_SIZE] == _TOTAL:
            _, end = read_digits(data, end + _TOTAL_SIZE)
        start = end + _COMPLETION_SIZE
        if data[end:start] == _COMPLETION:
            written, end = read_digits(data, start)
            if end > start:
                return read, written
    if _OBJECT.match(data, place) is None:
        return None
    received = _INPUT.search(data, place)
    sent = _OUTPUT.search(data, place)
    return (int(received[1]) if received else 0, int(sent[1]) if sent else 0)
