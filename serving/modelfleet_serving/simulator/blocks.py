"""The KV cache as blocks of tokens, shared between requests whose prompts begin alike."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence


def block_hashes(
    tokens: Sequence[int], block_size: int, *, parent: bytes = b"", start: int = 0
) -> Iterator[bytes]:
    """The hash of each full block: its tokens and everything before them.

    Args:
        tokens: All tokens; only those from ``start`` are hashed.
        block_size: Tokens in a block.
        parent: Hash of the block before ``start``; for the first one, what keeps caches apart (an adapter).
        start: A multiple of ``block_size``.
    """
    for first in range(start, len(tokens) - block_size + 1, block_size):
        content = array("Q", tokens[first : first + block_size]).tobytes()
        parent = hashlib.blake2b(parent + content, digest_size=16).digest()
        yield parent


class BlockPool:
    """A fixed number of blocks with reference counts.

    A block that nobody uses keeps its content, and can be used again by its hash, until the block is needed
    for something else: the one unused for longest goes first.
    """

    def __init__(self, blocks: int, *, caching: bool = True) -> None:
        self.total = blocks
        self._caching = caching
        self._references = [0] * blocks
        self._hashes: list[bytes | None] = [None] * blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))

    @property
    def free(self) -> int:
        """Blocks that nobody uses; cached content counts as free."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that can be found by their hash."""
        return len(self._by_hash)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0..1."""
        return 1 - len(self._free) / self.total if self.total else 0.0

    def take_cached(self, hashes: Sequence[bytes]) -> list[int]:
        """Uses the blocks of the longest cached beginning of ``hashes``."""
        taken = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
            taken.append(block)
        return taken

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks for new content, or ``None`` when there aren't so many; all or nothing."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _nothing = self._free.popitem(last=False)
            old = self._hashes[block]
            if old is not None:
                self._hashes[block] = None
                del self._by_hash[old]
            self._references[block] = 1
            taken.append(block)
        return taken

    def remember(self, block: int, value: bytes) -> None:
        """Makes a full block findable by its hash. A second block with the same content stays unnamed."""
        if self._caching and value not in self._by_hash:
            self._hashes[block] = value
            self._by_hash[value] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back, the last first: the end of a prompt is worth less than its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    def reset(self) -> bool:
        """Forgets all cached content; ``False`` and nothing done while blocks are in use."""
        if len(self._free) != self.total:
            return False
        self._by_hash.clear()
        self._hashes = [None] * self.total
        return True
