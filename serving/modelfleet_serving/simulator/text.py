"""What the simulator writes: text that its seed and the conversation decide, and nothing else.

Each token follows from all tokens before it. So replicas with one seed answer alike, and an answer that
was broken off and is continued (``continue_final_message``) goes on as if it had never been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from modelfleet_serving.simulator.tokens import encode

_WORDS: Final = """\
the and for are but not you all any can had her was one our out day get has him his how man new now old
see two way who boy did its let put say she too use dad mom big box car cat dog end eye far few fun got
hot job key law led lie lot low map men met mix net off oil own pay per pet pop pot ran raw red rid row
run sat saw sea set sir sit six sky son sun tax tea ten tie tip top toy try van war web win yes yet act
add age ago aid aim air arm art ask bad bag ban bar bed bet bit bus buy cap cup cut dry due ear eat egg
era fat fee fit fix fly fog fox gap gas gun guy hat ice ill ink jam joy kid lab lap leg lid
"""
_PLAIN: Final = [" " + word for word in _WORDS.split()]
_ENDED: Final = [f" {word}." for word in ("so", "it", "on", "in", "up", "we", "go", "us")]
VOCABULARY: Final = tuple((_PLAIN * 2)[: 256 - len(_ENDED)] + _ENDED)
"""256 pieces of four bytes: what the top byte of a state chooses from."""
TOKENS: Final = tuple(encode(piece)[0] for piece in VOCABULARY)

_MASK: Final = (1 << 64) - 1
_FACTOR: Final = 0x9E3779B97F4A7C15
_STEP: Final = 0xD1B54A32D192ED03


def start_state(*parts: str | int) -> int:
    """A state that all of ``parts`` decide: the seeds, the adapter, the choice's index."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def advance(state: int, tokens: Iterable[int]) -> int:
    """The state after more tokens."""
    for token in tokens:
        state = ((state ^ token) * _FACTOR + _STEP) & _MASK
        state ^= state >> 29
    return state


def natural_length(state: int, mean: int) -> int:
    """Tokens until the text ends by itself: between half and one and a half times ``mean``."""
    spread = (state * _STEP & _MASK) >> 32
    return max(1, mean // 2 + spread * mean // (1 << 32))


def instance(schema: Mapping[str, Any], depth: int = 0) -> Any:
    """The smallest value that a JSON schema's common keywords allow."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return instance(schema[key][0], depth)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        properties = schema.get("properties", {})
        names = schema.get("required", []) if depth > 8 else properties
        return {name: instance(properties.get(name, {}), depth + 1) for name in names}
    if kind == "array":
        return [instance(schema.get("items", {}), depth + 1) for _ in range(schema.get("minItems", 0))]
    return {
        "integer": schema.get("minimum", 1),
        "number": schema.get("minimum", 1.5),
        "boolean": True,
        "null": None,
    }.get(kind, "text".ljust(schema.get("minLength", 0), "."))
