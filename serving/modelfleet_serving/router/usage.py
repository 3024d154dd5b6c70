"""Token counts from an engine's answer, without parsing it."""

from __future__ import annotations

import re
from typing import Final

KEY: Final = b'"usage"'
"""Inside a JSON string its quotes would be escaped: bytes with this are a member's name, or a bare string."""
_OBJECT: Final = re.compile(rb'"usage"\s*:\s*\{')
_INPUT: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_OUTPUT: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
# As most engines write it. Where it is written otherwise, the patterns look for it.
_COMPACT: Final = re.compile(
    rb'"usage":\{"prompt_tokens":(\d{1,12}),(?:"total_tokens":\d+,)?"completion_tokens":(\d{1,12})'
)


def read_usage(data: bytes) -> tuple[int, int] | None:
    """Input and output tokens of the last usage object in ``data``, of OpenAI's or Anthropic's form."""
    place = data.rfind(KEY)
    if place < 0:
        return None
    compact = _COMPACT.match(data, place)
    if compact is not None:
        return int(compact[1]), int(compact[2])
    if _OBJECT.match(data, place) is None:
        return None
    received = _INPUT.search(data, place)
    sent = _OUTPUT.search(data, place)
    return (int(received[1]) if received else 0, int(sent[1]) if sent else 0)
