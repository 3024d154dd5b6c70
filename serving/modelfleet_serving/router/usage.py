"""Token counts from an engine's answer, without parsing it."""

from __future__ import annotations

import re
from typing import Final

_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
_INPUT: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_OUTPUT: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
KEY: Final = b'"usage"'
"""Inside a JSON string its quotes would be escaped: bytes with this are a member's name, or a bare string."""


def read_usage(data: bytes) -> tuple[int, int] | None:
    """Input and output tokens of the last usage object in ``data``, of OpenAI's or Anthropic's form."""
    place = data.rfind(KEY)
    if place < 0 or _USAGE.match(data, place) is None:
        return None
    received = _INPUT.search(data, place)
    sent = _OUTPUT.search(data, place)
    return (int(received[1]) if received else 0, int(sent[1]) if sent else 0)
