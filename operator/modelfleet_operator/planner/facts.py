"""Facts of a model's checkpoint that decide where it runs. Read by :mod:`.config` from ``config.json``."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


class AttentionKind(enum.StrEnum):
    """How a layer keeps what it attends to."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    MLA = "mla"
    LINEAR = "linear"
    """State of fixed size per sequence: Mamba, gated delta nets, short convolutions."""
    CROSS = "cross"
    """Keys and values of an encoder: fixed per sequence."""
    ENCODER = "encoder"
    """Bidirectional: no cache."""


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """Layers that share a layout of keys and values.

    Attributes:
        kind: how they attend.
        layers: how many.
        kv_heads: key and value heads; 1 for MLA.
        key_dim: values per key and head; for MLA the latent with its rotary part.
        value_dim: values per value and head; 0 for MLA, where the key holds both.
        window: tokens that a sliding or chunked layer keeps.
        state_bytes: bytes of state per sequence of a linear layer, its matrix in 32 bits.
        narrow_state_bytes: the same in an engine that keeps the matrix in the type that the model asks for.
    """

    kind: AttentionKind
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    state_bytes: int = 0
    narrow_state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters by how engines treat them.

    Attributes:
        linear: weights of linear layers that tensor parallelism splits and quantization applies to.
        expert: weights of routed experts: split and quantized likewise, listed apart for the explanation.
        replicated: linear weights that every rank holds whole (MLA's down projections, routers).
        replicated_quantized: the part of ``replicated`` that quantization applies to.
        embedding: input embedding; split by vocabulary.
        head: output head; 0 where it is tied to the embedding.
        vision: towers and projectors, kept in the model's own dtype.
        other: norms, biases, positions.
    """

    linear: int
    expert: int = 0
    replicated: int = 0
    replicated_quantized: int = 0
    embedding: int = 0
    head: int = 0
    vision: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return (
            self.linear
            + self.expert
            + self.replicated
            + self.embedding
            + self.head
            + self.vision
            + self.other
        )


@dataclass(frozen=True, slots=True)
class CheckpointQuantization:
    """What the checkpoint's ``quantization_config`` says.

    Attributes:
        method: ``quant_method``, in the checkpoint's words: ``awq``, ``gptq``, ``fp8``, ...
        scheme: canonical name of how weights and activations are kept: ``w4a16``, ``w8a8-int8``, ...
        bits: of a weight.
        group_size: weights that share a scale; ``None`` means a whole channel or tensor.
        symmetric: no zero points.
        block: FP8 block shape.
        quantizes_head: whether the output head is quantized too.
        quantizes_vision: whether the vision tower is quantized too.
        ignored: names or patterns of layers left alone.
    """

    method: str
    scheme: str
    bits: float
    group_size: int | None = None
    symmetric: bool = True
    block: tuple[int, int] | None = None
    quantizes_head: bool = False
    quantizes_vision: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Vision:
    """An encoder of images or audio beside the language model.

    Attributes:
        layers: of the encoder.
        hidden_size: of the encoder.
        intermediate_size: of the encoder.
        heads: of the encoder.
        max_item_tokens: language-model tokens that one image takes at the most.
        encoder_tokens: positions that the encoder itself works on for that image.
        modality: ``image`` or ``audio``.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    max_item_tokens: int
    encoder_tokens: int
    modality: str = "image"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the planner knows of a checkpoint.

    Attributes:
        architecture: first of ``architectures``.
        model_type: ``model_type``.
        hidden_size: of the language model.
        intermediate_size: of its MLPs, or of one expert where the config names no other.
        dense_intermediate_size: of what tokens pass beside routed experts: dense layers, shared experts.
        layers: of the language model.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: of one head.
        vocab_size: entries of the embedding.
        max_context: tokens that the model was made for.
        dtype: of the checkpoint: ``bfloat16``, ``float16``, ``float32``.
        parameters: counted by the architecture's arithmetic.
        attention: layouts of keys and values.
        experts: routed experts; 0 for dense models.
        experts_per_token: routed experts that a token visits.
        expert_intermediate_size: of one routed expert.
        quantization: what the checkpoint says of it.
        vision: an encoder beside the language model.
        rope_values: entries of the rotary tables that engines keep beside the weights.
        tensor_bytes: bytes of all tensors by dtype, from the safetensors headers; empty without them.
        source: where the facts came from.
        revision: commit of the source, where it has one.
        approximate: what to know of sizes that are rougher than usual; empty where they are not.
    """

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    dtype: str
    parameters: Parameters
    attention: tuple[AttentionLayers, ...]
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    dense_intermediate_size: int = 0
    quantization: CheckpointQuantization | None = None
    vision: Vision | None = None
    rope_values: int = 0
    tensor_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    source: str = ""
    revision: str = ""
    approximate: str = ""

    @property
    def uses_mla(self) -> bool:
        """Whether keys and values are kept as a shared latent."""
        return any(a.kind is AttentionKind.MLA for a in self.attention)


@dataclass(frozen=True, slots=True)
class ModelUnavailable:
    """Why there are no facts.

    Attributes:
        reason: ``NotFound``, ``Gated``, ``Unauthorized``, ``Unreachable``, ``BrokenConfig``, ...
        message: one sentence for people.
        retryable: may pass by itself.
        unseen: the checkpoint can't be looked into from here at all, though an engine may well load it:
            the variant is run as its user asks, without arithmetic.
    """

    reason: str
    message: str
    retryable: bool = False
    unseen: bool = False
