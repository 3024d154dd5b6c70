"""Which replica has seen which prefix: a fixed table of 8-byte cells, in memory that workers may share.

The table is set-associative. A block's hash names a bucket of eight cells, one cache line; a cell holds the
16-bit code of a replica and the upper 48 bits of a hash. The first cell of a bucket is the one used last, and
a new entry pushes the last one out. Cells are written without a lock: a race loses an entry, writes one
twice, or in the worst case mixes two, and each of these costs a cache miss and nothing else.

Buckets are searched as bytes: that is one call where a loop over cells would be ten times slower. Where the
data path is compiled, C does it (``prefixes.c``), on the same layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from modelfleet_serving.router import wire

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUCKET: Final = 64
_CELL: Final = 8
_NEAR_END: Final = 3

DEFAULT_BYTES: Final = 8 * 1024 * 1024
"""A million entries: prompts of at least 512 MB in all."""


class PrefixTable:
    """Holders by block hash.

    Args:
        memory: Zeroed and writable, a power of two of at least 64 bytes; ``None`` takes private memory.
        size: Of the private memory, in bytes.
    """

    __slots__ = ("_mask", "_memory", "_quick")

    def __init__(self, memory: Buffer | None = None, size: int = DEFAULT_BYTES) -> None:
        view = memoryview(bytearray(size) if memory is None else memory).cast("B")
        size = view.nbytes
        if view.readonly or size < _BUCKET or size & (size - 1):
            raise ValueError(f"the prefix table needs a writable power of two of bytes, not {size}")
        self._memory = view
        self._mask = size // _BUCKET - 1
        self._quick: Any = None if wire.Prefixes is None else wire.Prefixes(view)

    def holders(self, value: int) -> list[int]:
        """Codes of the replicas that have seen a block, the last used first."""
        if self._quick is not None:
            found: list[int] = self._quick.holders(value)
            return found
        offset = (value & self._mask) * _BUCKET
        bucket = self._memory[offset : offset + _BUCKET].tobytes()
        tag = (value >> 16).to_bytes(6, "little")
        place = bucket.find(tag)
        codes: list[int] = []
        while place >= 0:
            if place % _CELL == 2 and (code := bucket[place - 2] | bucket[place - 1] << 8):
                codes.append(code)
            place = bucket.find(tag, place + 1)
        return codes

    def add(self, value: int, code: int) -> int:
        """A replica has seen a block.

        Returns:
            0 when that is new, 1 when it was known, 2 when it was also the last news of its bucket.
        """
        if self._quick is not None:
            known: int = self._quick.add(value, code)
            return known
        offset = (value & self._mask) * _BUCKET
        memory = self._memory
        bucket = memory[offset : offset + _BUCKET].tobytes()
        entry = code.to_bytes(2, "little") + (value >> 16).to_bytes(6, "little")
        if bucket.startswith(entry):
            return 2
        place = bucket.find(entry)
        while place % _CELL and place >= 0:
            place = bucket.find(entry, place + 1)
        if place < 0:
            memory[offset : offset + _BUCKET] = entry + bucket[:-_CELL]
            return 0
        memory[offset : offset + place + _CELL] = entry + bucket[:place]
        return 1

    def record(self, hashes: list[int], code: int) -> None:
        """A replica gets a prompt with these blocks, of which it may have seen the first ones."""
        if self._quick is not None:
            self._quick.record(hashes, code)
            return
        # From the end: what it holds already needs no writing but for its place in the order of use.
        for block in range(len(hashes) - 1, -1, -1):
            known = self.add(hashes[block], code)
            if known:
                if known == 1 and block:
                    self.add(hashes[0], code)
                return

    def among(self, value: int, by_code: dict[int, int], without: set[int]) -> list[int]:
        """Members that have seen a block, by ``by_code``, but for those in ``without``."""
        codes = self.holders(value)
        found: list[int] = []
        for code in codes:
            index = by_code.get(code, -1)
            if index >= 0 and index not in without:
                found.append(index)
        return found

    def deepest(
        self, hashes: list[int], stop: int, by_code: dict[int, int], without: set[int]
    ) -> tuple[int, list[int]]:
        """The last block before ``stop`` that a member has seen, and those members; -1 for none.

        It looks at the last block, which is known when a prompt or conversation comes again, at the first
        one, at those before the last one and then halves: who has seen a block has seen those before it, as
        far as the table still knows.
        """
        if self._quick is not None:
            deepest: tuple[int, list[int]] = self._quick.deepest(hashes, stop, by_code, without)
            return deepest
        last = stop - 1
        if last < 0:
            return -1, []
        found = self.among(hashes[last], by_code, without)
        if found or not last:
            return (last if found else -1), found
        found = self.among(hashes[0], by_code, without)
        if not found:
            return -1, found
        low, high = 0, last
        near_end = max(0, last - _NEAR_END)
        for block in range(last - 1, near_end, -1):
            members = self.among(hashes[block], by_code, without)
            if members:
                return block, members
            high = block
        while high - low > 1:
            middle = (low + high) // 2
            members = self.among(hashes[middle], by_code, without)
            if members:
                low, found = middle, members
            else:
                high = middle
        return low, found
