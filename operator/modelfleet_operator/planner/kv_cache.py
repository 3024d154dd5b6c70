"""The KV cache: bytes of a block, blocks of a request, and how many tokens a given memory holds.

vLLM lays all layers of a kind into groups of equal size that share one pool of blocks, and calls
``blocks / blocks of a request at the full context * context`` the cache's size in tokens
(``v1/core/kv_cache_utils.py``: ``get_kv_cache_capacity``). The same is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from modelfleet_operator.planner.facts import AttentionKind, AttentionLayers, ModelFacts


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose blocks are allocated together.

    Attributes:
        kind: how they attend.
        window: tokens that a sliding or chunked layer keeps.
    """

    kind: AttentionKind
    window: int | None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one rank lays out the KV cache.

    Attributes:
        block_size: tokens of a block.
        page_bytes: bytes of a block of one layer.
        layers_per_group: layers of each group, padding included.
        groups: kinds of groups, and how many there are of each.
        in_flight_tokens: tokens of the steps in flight, which a sliding window holds besides its own.
        kinds: what the groups were made of, with the layers of this rank.
        dtype_bytes: bytes of a cached value.
        tensor_parallel: ranks that share a layer.
    """

    block_size: int
    page_bytes: int
    layers_per_group: int
    groups: tuple[tuple[Group, int], ...]
    in_flight_tokens: int
    kinds: tuple[tuple[AttentionLayers, int], ...] = ()
    dtype_bytes: float = 2.0
    tensor_parallel: int = 1

    @property
    def empty(self) -> bool:
        """Whether the model keeps nothing: encoders."""
        return not self.groups

    def blocks(self, memory: float) -> int:
        """Blocks that fit into so many bytes."""
        if self.empty:
            return 0
        return max(int(memory) // (self.page_bytes * self.layers_per_group), 0)

    def blocks_per_request(self, tokens: int) -> int:
        """Blocks of one request of so many tokens, over all groups."""
        return sum(self._group_blocks(group, tokens) * count for group, count in self.groups)

    def request_bytes(self, tokens: int) -> int:
        """Bytes of one request of so many tokens."""
        return self.blocks_per_request(tokens) * self.page_bytes * self.layers_per_group

    def concurrency(self, memory: float, max_model_len: int) -> float:
        """Requests of the full context at once, as vLLM reports it."""
        if self.empty:
            return float("inf")
        return self.blocks(memory) / self.blocks_per_request(max_model_len)

    def tokens(self, memory: float, max_model_len: int) -> int:
        """Size of the cache in tokens, as vLLM reports it."""
        if self.empty:
            return 0
        return int(self.concurrency(memory, max_model_len) * max_model_len)

    def largest_context(self, memory: float, limit: int) -> int:
        """Longest single request that fits, up to a limit; 0 where not even one token does."""
        if self.empty:
            return limit
        blocks = self.blocks(memory)
        if self.blocks_per_request(limit) <= blocks:
            return limit
        if all(group.window is None and group.kind is not AttentionKind.LINEAR for group, _ in self.groups):
            return blocks // sum(count for _, count in self.groups) * self.block_size
        low, high = 0, limit
        while low < high:  # longest context whose blocks fit
            middle = (low + high + 1) // 2
            if self.blocks_per_request(middle) <= blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def explain(self) -> str:
        """One line: bytes of a token."""
        if self.empty:
            return "no KV cache: the model attends in both directions"
        per_token = sum(_token_bytes(a, self.dtype_bytes, self.tensor_parallel) * n for a, n in self.kinds)
        return _describe(self.kinds, self.dtype_bytes, self.tensor_parallel, per_token)

    def _group_blocks(self, group: Group, tokens: int) -> int:
        if group.kind is AttentionKind.LINEAR:
            return 1
        if group.kind is AttentionKind.CROSS:
            return ceil((group.window or 0) / self.block_size)
        if group.window is None:
            return ceil(tokens / self.block_size)
        if group.kind is AttentionKind.CHUNKED:
            return ceil(min(group.window + self.in_flight_tokens, tokens) / self.block_size)
        # One more block: the window may begin in the middle of one.
        return ceil(min(group.window - 1 + self.in_flight_tokens, tokens) / self.block_size) + 1


def kv_heads_per_rank(kv_heads: int, tensor_parallel: int) -> int:
    """KV heads that each rank holds: split while there are enough, replicated beyond."""
    return max(kv_heads // tensor_parallel, 1)


def kv_layout(
    facts: ModelFacts,
    *,
    block_size: int,
    dtype_bytes: float,
    tensor_parallel: int,
    pipeline_parallel: int,
    in_flight_tokens: int,
    encoder_tokens: int | None = None,
    narrow_state: bool = False,
) -> KVLayout:
    """Layout of one rank's KV cache; the fullest pipeline stage counts.

    MLA keeps one latent for all heads, which every rank holds whole. ``encoder_tokens`` are what an engine
    sets aside for a request's cross attention, where that is not the encoder's length: in vLLM
    ``CrossAttentionSpec`` takes ``max_num_encoder_input_tokens``, which is the batch by
    ``config/scheduler.py``. ``narrow_state`` says whether it keeps the state of linear layers in the model's
    own type.
    """
    kinds = [a for a in facts.attention if a.kind is not AttentionKind.ENCODER]
    if not kinds:
        return KVLayout(block_size, 0, 1, (), in_flight_tokens)
    attending = [a for a in kinds if a.kind is not AttentionKind.LINEAR] or kinds
    linear = [a for a in kinds if a.kind is AttentionKind.LINEAR]
    token_bytes = max(_token_bytes(a, dtype_bytes, tensor_parallel) for a in attending)
    if linear and attending is not kinds:
        # Blocks of attention grow until a page holds a layer's state, so that both share one pool.
        state = max(_state(a, narrow=narrow_state) for a in linear) / tensor_parallel
        block_size = max(block_size, ceil(state / token_bytes / block_size) * block_size)
    page = int(token_bytes * block_size)
    page = page or max(_state(a, narrow=narrow_state) for a in linear) // tensor_parallel
    counts = tuple((a, ceil(a.layers / pipeline_parallel)) for a in kinds)
    size = _group_size([n for _, n in counts])
    groups = tuple((Group(a.kind, _kept(a, encoder_tokens)), ceil(n / size)) for a, n in counts)
    return KVLayout(
        block_size=block_size,
        page_bytes=page,
        layers_per_group=size,
        groups=groups,
        in_flight_tokens=in_flight_tokens,
        kinds=counts,
        dtype_bytes=dtype_bytes,
        tensor_parallel=tensor_parallel,
    )


def _state(layers: AttentionLayers, *, narrow: bool) -> int:
    return (layers.narrow_state_bytes if narrow else 0) or layers.state_bytes


def _kept(layers: AttentionLayers, encoder_tokens: int | None) -> int | None:
    """Tokens that a layer keeps, where that is not the whole context."""
    if layers.kind is AttentionKind.CROSS and encoder_tokens is not None:
        return encoder_tokens
    return layers.window


def _token_bytes(layers: AttentionLayers, dtype_bytes: float, tensor_parallel: int) -> float:
    if layers.kind is AttentionKind.LINEAR:
        return 0.0
    heads = kv_heads_per_rank(layers.kv_heads, tensor_parallel)
    return heads * (layers.key_dim + layers.value_dim) * dtype_bytes


def _group_size(counts: list[int]) -> int:
    """Layers of a group: the smaller kind's count, unless the kinds are nearly as many.

    From vLLM's ``_get_kv_cache_groups_uniform_page_size``: padding is cheaper than many groups there.
    """
    smallest, largest = min(counts), max(counts)
    return largest if largest < smallest * 1.25 else smallest


def _describe(
    counts: Sequence[tuple[AttentionLayers, int]],
    dtype_bytes: float,
    tensor_parallel: int,
    per_token: float,
) -> str:
    parts = []
    for layers, count in counts:
        if layers.kind is AttentionKind.LINEAR:
            parts.append(f"{count} layers of fixed state")
            continue
        heads = kv_heads_per_rank(layers.kv_heads, tensor_parallel)
        name = f" ({layers.kind}{f' {layers.window}' if layers.window else ''})"
        name = "" if layers.kind is AttentionKind.FULL else name
        shape = (
            f"{layers.key_dim} latent"
            if layers.kind is AttentionKind.MLA
            else f"2 x {heads} KV heads x {layers.key_dim}"
        )
        parts.append(f"{count} layers{name} x {shape} x {dtype_bytes:g} B")
    return f"KV cache per token and GPU: {' + '.join(parts)} = {per_token:,.0f} B"
