"""Counting a model's parameters from its dimensions, by how engines split and quantize them."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.planner.facts import Parameters
from modelfleet_operator.planner.fields import Config, integer, optional

PLAIN_MLP = frozenset(
    {"bert", "roberta", "xlm-roberta", "distilbert", "whisper", "gpt2", "opt", "phi", "starcoder2", "falcon",
     "gpt_neox", "bloom", "gpt_bigcode", "mpt"}
)  # fmt: skip
"""Model types whose MLP has two matrices; all others gate it with a third."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a language model, under one set of names."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int
    expert_intermediate: int
    tied: bool
    encoder_only: bool
    encoder_decoder: bool

    def is_mla(self, text: Config) -> bool:
        """Whether keys and values are a shared latent (DeepSeek-V2 and its kin)."""
        return bool(text.get("kv_lora_rank")) and text.get("use_mla") is not False


def count_parameters(shape: Shape, text: Config, *, vision_parameters: int = 0) -> Parameters:
    """All parameters of a model.

    Args:
        shape: its dimensions.
        text: the language model's config, for what only some families have.
        vision_parameters: of the towers beside it.
    """
    split, replicated = _attention(shape, text)
    router = 0
    linear = split * shape.layers
    expert = 0
    matrices = 2 if shape.model_type in PLAIN_MLP else 3
    for is_moe, count in _mlp_layers(shape, text):
        if is_moe:
            expert += count * shape.experts * 3 * shape.hidden * shape.expert_intermediate
            linear += count * 3 * shape.hidden * _shared_intermediate(shape, text)
            router += count * shape.hidden * shape.experts
        else:
            linear += count * matrices * shape.hidden * _dense_intermediate(shape, text)
    extra_linear, other = _rest(shape, text)
    embedding = shape.vocab * shape.hidden
    return Parameters(
        linear=linear + extra_linear,
        expert=expert,
        replicated=replicated * shape.layers + router,
        replicated_quantized=replicated * shape.layers,
        embedding=embedding,
        head=0 if shape.tied or shape.encoder_only else embedding,
        vision=vision_parameters,
        other=other,
    )


def _attention(shape: Shape, text: Config) -> tuple[int, int]:
    """Weights of one layer's attention: split over ranks, and held whole by each."""
    h = shape.hidden
    if not shape.is_mla(text):
        q = h * shape.heads * shape.head_dim
        gate = q if text.get("attn_output_gate") else 0
        return 2 * q + gate + 2 * h * shape.kv_heads * shape.head_dim, 0
    rank = integer(text, "kv_lora_rank")
    nope = integer(text, "qk_nope_head_dim", default=128)
    rope = integer(text, "qk_rope_head_dim", default=64)
    value = integer(text, "v_head_dim", default=128)
    q_rank = optional(text, "q_lora_rank")
    down = h * (rank + rope) + (h * q_rank if q_rank else 0)
    query = (q_rank or h) * shape.heads * (nope + rope)
    up = rank * shape.heads * (nope + value) + shape.heads * value * h
    return query + up, down


def _mlp_layers(shape: Shape, text: Config) -> list[tuple[bool, int]]:
    """How many layers are mixtures of experts and how many are dense."""
    if not shape.experts:
        return [(False, shape.layers)]
    if every := integer(text, "expert_layer_period", default=0):  # Jamba
        first = integer(text, "expert_layer_offset", default=0) % every
        moe = sum(i % every == first for i in range(shape.layers))
        return [(True, moe), (False, shape.layers - moe)]
    dense = integer(text, "first_k_dense_replace", default=0)
    step = integer(text, "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", default=1) \
        if not isinstance(text.get("moe_layer_freq"), list) else 1  # fmt: skip
    listed = text.get("mlp_only_layers")
    named = {i for i in listed if isinstance(i, int)} if isinstance(listed, list) else set()
    moe = sum(
        1
        for i in range(shape.layers)
        if i >= dense and i not in named and (i + 1 - dense) % max(step, 1) == 0
    )
    return [(True, moe), (False, shape.layers - moe)]


def dense_intermediate(shape: Shape, text: Config) -> int:
    """Widest MLP that is not a routed expert; 0 where there is none."""
    if not shape.experts:
        return shape.intermediate
    dense = [n for is_moe, n in _mlp_layers(shape, text) if not is_moe and n]
    return max(_shared_intermediate(shape, text), _dense_intermediate(shape, text) if dense else 0)


def _shared_intermediate(shape: Shape, text: Config) -> int:
    size = optional(text, "shared_expert_intermediate_size")
    if size is not None:
        return size
    if shape.model_type.startswith("llama4"):
        return shape.expert_intermediate
    return integer(text, "n_shared_experts", "num_shared_experts", default=0) * shape.expert_intermediate


def _dense_intermediate(shape: Shape, text: Config) -> int:
    return integer(text, "intermediate_size_mlp", default=shape.intermediate)


def _rest(shape: Shape, text: Config) -> tuple[int, int]:
    """What is beside the decoder layers: linear weights, and everything small or unsplit."""
    h = shape.hidden
    other = (2 * shape.layers + 1) * h
    if shape.encoder_only:
        positions = integer(text, "max_position_embeddings", default=512)
        return h * h, other * 2 + (positions + 2) * h  # pooler; biases weigh as much as norms
    if shape.encoder_decoder:
        layers = integer(text, "encoder_layers", default=shape.layers)
        ffn = integer(text, "encoder_ffn_dim", default=shape.intermediate)
        encoder = layers * (4 * h * h + 2 * h * ffn)
        cross = shape.layers * 4 * h * h
        positions = integer(text, "max_source_positions", default=1500) + integer(
            text, "max_target_positions", default=448
        )
        return encoder + cross, other * 3 + positions * h + 3 * h * (h + 128)
    return 0, other
