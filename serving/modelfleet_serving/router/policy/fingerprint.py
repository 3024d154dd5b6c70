"""What a prompt begins with, as a chain of hashes over growing blocks of its bytes.

Two prompts that share their first ``n`` blocks share their first ``n`` hashes. The raw JSON of the message
list is hashed, not its parsed text: clients append messages and leave earlier ones as they are, so a
conversation's next request begins with the bytes of the last one, up to the bracket that closes the list.
Images as data URLs are part of those bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh64_intdigest

from modelfleet_serving.router import wire

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK: Final = 512
"""Bytes of the first blocks: about 128 tokens of English."""
_PER_SIZE: Final = 4
"""Blocks of one size; then the size doubles: 32 KB are 16 blocks, 220 KB are 27, 64 MB are 60.

A boundary is never further off than a fifth of what lies before it. In simulation twice as many blocks gain
nothing.
"""
_SIZES: Final = 18


def _ends() -> tuple[int, ...]:
    ends = []
    end = 0
    for doubling in range(_SIZES):
        for _ in range(_PER_SIZE):
            end += BLOCK << doubling
            ends.append(end)
    return tuple(ends)


ENDS: Final = _ends()
"""Where each block ends, in bytes."""
_ENDS: Final = array("q", ENDS)
_hash_blocks: Final[Any] = wire.hash_blocks


class Fingerprint:
    """Hashes of a prompt's beginning.

    Attributes:
        hashes: one a block, each of everything up to the end of its block.
        size: bytes of the prompt.
        held: bytes of it that the chosen replica holds; set by the choice.
        code: the chosen replica's code in the prefix table.
    """

    __slots__ = ("_base", "_skip", "code", "hashes", "held", "size")

    def __init__(self, hashes: list[int], size: int, base: int, skip: int) -> None:
        self.hashes = hashes
        self.size = size
        self.held = self.code = 0
        self._base = base
        self._skip = skip

    def end(self, block: int) -> int:
        """Bytes of the prompt up to the end of a block."""
        block -= self._skip
        return self._base + (ENDS[block] if block >= 0 else 0)


def seed_of(*parts: str) -> int:
    """Seed of a chain: model, variant, adapter, tenant's salt. Chains of different seeds share nothing."""
    seed = 0
    for part in parts:
        seed = xxh64_intdigest(part.encode(), seed)
    return seed


def _hash_slowly(view: memoryview, size: int, seed: int) -> list[int]:
    hashes: list[int] = []
    start = 0
    for end in ENDS:
        if end > size:
            break
        seed = xxh64_intdigest(view[start:end], seed)
        hashes.append(seed)
        start = end
    return hashes


def fingerprint(prompt: Buffer, seed: int = 0, before: Sequence[Buffer] = ()) -> Fingerprint | None:
    """The fingerprint of a prompt, ``None`` when it is too short to be worth a thought.

    Args:
        prompt: Raw JSON of ``messages``, ``prompt`` or ``input``.
        seed: From :func:`seed_of`.
        before: Raw JSON of what the engine puts in front of it: ``tools``, ``system``. They count as one
            block: where they differ nothing is shared.

    A list's closing bracket or a string's closing quote is left out, and so is the last block while it is
    not full: both change when the prompt is continued.
    """
    view = memoryview(prompt)
    base = 0
    for part in before:
        size = memoryview(part).nbytes
        if size:
            seed = xxh64_intdigest(part, seed)
            base += size
    size = view.nbytes - 1
    while size > 0 and view[size - 1] in b" \t\r\n":
        size -= 1
    skip = 0
    if base >= BLOCK:
        skip = 1
    elif size < BLOCK:
        return None
    quick = _hash_blocks
    hashes: list[int] = _hash_slowly(view, size, seed) if quick is None else quick(view, size, seed, _ENDS)
    if skip:
        hashes.insert(0, seed)
    return Fingerprint(hashes, base + max(size, 0), base, skip) if hashes else None
