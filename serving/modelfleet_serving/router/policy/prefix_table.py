"""Which replica has seen which prefix: a fixed table of 8-byte cells, in memory that workers may share.

The table is set-associative. A block's hash names a bucket of eight cells, one cache line; a cell holds the
16-bit code of a replica and the upper 48 bits of a hash. The first cell of a bucket is the one used last, and
a new entry pushes the last one out. Cells are written without a lock: a race loses an entry, writes one
twice, or in the worst case mixes two, and each of these costs a cache miss and nothing else.

Buckets are searched as bytes: that is one call where a loop over cells would be ten times slower.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUCKET: Final = 64
_CELL: Final = 8
_NEAR_END: Final = 3
_NONE: Final[Sequence[int]] = ()

DEFAULT_BYTES: Final = 8 * 1024 * 1024
"""A million entries: prompts of at least 512 MB in all."""


class PrefixTable:
    """Holders by block hash.

    Args:
        memory: Zeroed and writable, a power of two of at least 64 bytes; ``None`` takes private memory.
        size: Of the private memory, in bytes.
    """

    __slots__ = ("_mask", "_memory")

    def __init__(self, memory: Buffer | None = None, size: int = DEFAULT_BYTES) -> None:
        view = memoryview(bytearray(size) if memory is None else memory).cast("B")
        size = view.nbytes
        if view.readonly or size < _BUCKET or size & (size - 1):
            raise ValueError(f"the prefix table needs a writable power of two of bytes, not {size}")
        self._memory = view
        self._mask = size // _BUCKET - 1

    def holders(self, value: int) -> Sequence[int]:
        """Codes of the replicas that have seen a block, the last used first."""
        offset = (value & self._mask) * _BUCKET
        bucket = self._memory[offset : offset + _BUCKET].tobytes()
        tag = (value >> 16).to_bytes(6, "little")
        place = bucket.find(tag)
        if place < 0:
            return _NONE
        codes = []
        while place >= 0:
            if place % _CELL == 2 and (code := bucket[place - 2] | bucket[place - 1] << 8):
                codes.append(code)
            place = bucket.find(tag, place + 1)
        return codes

    def add(self, value: int, code: int) -> bool:
        """A replica has seen a block; returns whether that was known."""
        offset = (value & self._mask) * _BUCKET
        memory = self._memory
        bucket = memory[offset : offset + _BUCKET].tobytes()
        entry = code.to_bytes(2, "little") + (value >> 16).to_bytes(6, "little")
        if bucket.startswith(entry):
            return True
        place = bucket.find(entry)
        while place % _CELL and place >= 0:
            place = bucket.find(entry, place + 1)
        if place < 0:
            memory[offset : offset + _BUCKET] = entry + bucket[:-_CELL]
            return False
        memory[offset : offset + place + _CELL] = entry + bucket[:place]
        return True

    def deepest(
        self,
        hashes: Sequence[int],
        stop: int,
        known: Collection[int],
        without: Collection[int],
    ) -> tuple[int, Sequence[int]]:
        """The last block before ``stop`` that a known replica has seen, and those replicas; -1 for none.

        ``known`` holds the codes that count, ``without`` codes that don't. It looks at the first block, at
        the last ones and then halves: who has seen a block has seen those before it, as far as the table
        still knows.
        """

        def at(block: int) -> Sequence[int]:
            codes = self.holders(hashes[block])
            return codes and [code for code in codes if code in known and code not in without]

        if stop <= 0:
            return -1, _NONE
        found = at(0)
        if not found:
            return -1, _NONE
        low, high = 0, stop
        for block in range(stop - 1, max(0, stop - 1 - _NEAR_END), -1):
            codes = at(block)
            if codes:
                return block, codes
            high = block
        while high - low > 1:
            middle = (low + high) // 2
            codes = at(middle)
            if codes:
                low, found = middle, codes
            else:
                high = middle
        return low, found
