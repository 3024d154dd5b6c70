"""Which replica has seen which prefix: a fixed table of 64-bit cells, in memory that workers may share.

The table is set-associative. A block's hash names a bucket of eight cells, one cache line; a cell holds the
upper 48 bits of a hash and the 16-bit code of a replica. The first cell of a bucket is the one used last, and
a new entry pushes the last one out. Cells are written without a lock: a race loses an entry or writes one
twice, never a half one, and a lost entry costs a cache miss.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WAYS: Final = 8
_BUCKET: Final = struct.Struct("=8Q")
_TAG: Final = 0xFFFF_FFFF_FFFF_0000
_CODE: Final = 0xFFFF
_NEAR_END: Final = 3

DEFAULT_BYTES: Final = 8 * 1024 * 1024
"""A million entries: prompts of at least 512 MB in all."""


class PrefixTable:
    """Holders by block hash.

    Args:
        memory: Zeroed and writable, a power of two of at least 64 bytes (a shared ``mmap``); ``None`` takes
            private memory of ``size`` bytes.
    """

    __slots__ = ("_mask", "_memory")

    def __init__(self, memory: Buffer | None = None, size: int = DEFAULT_BYTES) -> None:
        view = memoryview(bytearray(size) if memory is None else memory)
        if view.readonly or view.nbytes < _BUCKET.size or view.nbytes & (view.nbytes - 1):
            raise ValueError(f"the prefix table needs a writable power of two of bytes, not {view.nbytes}")
        self._memory = view
        self._mask = view.nbytes // _BUCKET.size - 1

    def holders(self, value: int) -> list[int]:
        """Codes of the replicas that have seen a block, the last used first."""
        cells = _BUCKET.unpack_from(self._memory, (value & self._mask) * 64)
        tag = value & _TAG
        return [cell & _CODE for cell in cells if cell ^ tag <= _CODE and cell & _CODE]

    def add(self, value: int, code: int) -> bool:
        """A replica has seen a block; returns whether that was known."""
        offset = (value & self._mask) * 64
        entry = value & _TAG | code
        cells = _BUCKET.unpack_from(self._memory, offset)
        if cells[0] == entry:
            return True
        known = entry in cells
        place = cells.index(entry) if known else _WAYS - 1
        _BUCKET.pack_into(self._memory, offset, entry, *cells[:place], *cells[place + 1 :])
        return known

    def deepest(
        self,
        hashes: Sequence[int],
        stop: int,
        known: Collection[int],
        without: Collection[int],
    ) -> tuple[int, list[int]]:
        """The last block before ``stop`` that a known replica has seen, and those replicas; -1 for none.

        ``known`` holds the codes that count, ``without`` codes that don't. It looks at the first block, at
        the last ones and then halves: who has seen a block has seen those before it, as far as the table
        still knows.
        """

        def at(block: int) -> list[int]:
            return [code for code in self.holders(hashes[block]) if code in known and code not in without]

        if stop <= 0:
            return -1, []
        found = at(0)
        if not found:
            return -1, []
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
