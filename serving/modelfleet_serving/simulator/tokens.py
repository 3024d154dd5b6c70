"""A tokenizer that is cheap, exact both ways, and keeps prefixes: four bytes of UTF-8 are one token.

What the simulator writes is made of whole tokens, too, so that a conversation sent back to it is cut the
same way and its prefix is found in the cache, as with a real model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

BYTES_PER_TOKEN: Final = 4

_SPECIAL: Final = 1 << 40
SPECIAL_TEXT: Final = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|image|>")
END: Final = _SPECIAL + SPECIAL_TEXT.index("<|end|>")
IMAGE: Final = _SPECIAL + SPECIAL_TEXT.index("<|image|>")
_ROLES: Final = {
    name: _SPECIAL + SPECIAL_TEXT.index(f"<|{name}|>") for name in ("system", "user", "assistant", "tool")
}


def role_token(role: str) -> int:
    """The token that begins a message; roles that we don't know begin like the user's."""
    return _ROLES.get("system" if role == "developer" else role, _ROLES["user"])


def encode(text: str) -> list[int]:
    """Token ids of a text. An id is its bytes behind a 1, which keeps their number."""
    data = text.encode("utf-8", "surrogatepass")
    return [
        int.from_bytes(b"\x01" + data[start : start + BYTES_PER_TOKEN], "big")
        for start in range(0, len(data), BYTES_PER_TOKEN)
    ]


def decode(tokens: Iterable[int]) -> str:
    """The text of token ids. Bytes that aren't UTF-8, and ids that were never given out, become U+FFFD."""
    parts: list[bytes] = []
    for token in tokens:
        special = token - _SPECIAL
        if 0 <= special < len(SPECIAL_TEXT):
            parts.append(SPECIAL_TEXT[special].encode())
            continue
        length = (token.bit_length() - 1) // 8 if token > 0 else 0
        known = 1 <= length <= BYTES_PER_TOKEN and token >> (8 * length) == 1
        parts.append(token.to_bytes(length + 1, "big")[1:] if known else "\ufffd".encode())
    return b"".join(parts).decode("utf-8", "replace")
