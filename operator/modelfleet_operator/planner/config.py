"""From a ``config.json`` to :class:`ModelFacts`: dimensions, attention layouts, limits.

Field names and their meaning are those of the Hugging Face configurations as vLLM's
``transformers_utils/model_arch_config_convertor.py`` reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from modelfleet_operator.planner.checkpoint_quantization import parse_quantization
from modelfleet_operator.planner.facts import AttentionKind, AttentionLayers, ModelFacts
from modelfleet_operator.planner.fields import (
    BrokenConfigError,
    Config,
    integer,
    optional,
    positive,
    section,
    text_config,
    words,
)
from modelfleet_operator.planner.hybrid import (
    LINEAR_NAMES,
    NONE_NAMES,
    layer_names,
    matrix_bytes,
    state_bytes,
)
from modelfleet_operator.planner.parameters import Shape, count_parameters, dense_intermediate
from modelfleet_operator.planner.vision import parse_vision

DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "half": "float16", "float32": "float32"}
ENCODER_ONLY = frozenset({"bert", "roberta", "xlm-roberta", "nomic_bert", "new", "modernbert", "distilbert"})
"""Model types that attend in both directions and keep nothing."""
ENCODER_DECODER = frozenset({"whisper", "bart", "mbart", "t5"})
TIED = frozenset(
    {"gemma", "gemma2", "gemma3_text", "whisper", "gpt2", "bloom", "bart", "mbart", "t5", "mamba"}
)
"""Model types that share embedding and head where the config says nothing."""
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_top_k")
MOST_LAYERS = 10_000
NESTED = ("attn_config", "ffn_config")
"""Sections of DBRX and MPT with dimensions that others have beside the rest."""


def facts_from_config(
    config: Mapping[str, Any],
    *,
    tensor_bytes: Mapping[str, int] | None = None,
    source: str = "",
    revision: str = "",
) -> ModelFacts:
    """Facts of a checkpoint.

    Args:
        config: ``config.json``, best with the defaults of its configuration class filled in.
        tensor_bytes: bytes of all tensors by safetensors dtype, where the headers could be read.
        source: where it came from, for messages.
        revision: commit, where there is one.

    Raises:
        BrokenConfigError: the config lacks something that the arithmetic needs, or is no such config at all.
    """
    try:
        return _facts(config, tensor_bytes or {}, source, revision)
    except BrokenConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # Anybody can write anything into a config.json: what no field's own check has caught ends here.
        raise BrokenConfigError(f"config.json makes no sense ({type(error).__name__}: {error})") from error


def _facts(config: Config, tensor_bytes: Mapping[str, int], source: str, revision: str) -> ModelFacts:
    text = text_config(config)
    for name in NESTED:
        text = {**(section(text, name) or {}), **text}
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    architecture = _architecture(config, text)
    shape = _shape(text, config, model_type)
    quantization = parse_quantization(_quantization_section(config, text))
    vision = parse_vision(config, text)
    parameters = count_parameters(shape, text, vision_parameters=vision.parameters if vision else 0)
    return ModelFacts(
        architecture=architecture,
        model_type=str(config.get("model_type") or model_type),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_context=_max_context(text, config),
        dtype=_dtype(config, text),
        parameters=parameters,
        attention=_attention(text, shape, model_type),
        experts=shape.experts,
        experts_per_token=integer(
            text, "num_experts_per_tok", "experts_per_token", "moe_topk", "moe_top_k", default=0
        )
        if shape.experts
        else 0,
        expert_intermediate_size=shape.expert_intermediate if shape.experts else 0,
        dense_intermediate_size=dense_intermediate(shape, text),
        quantization=quantization,
        vision=vision.facts if vision else None,
        rope_values=_rope_values(text, shape),
        tensor_bytes=MappingProxyType(dict(tensor_bytes)),
        source=source,
        revision=revision,
        approximate="" if tensor_bytes else _approximation(text, shape),
    )


def _approximation(text: Config, shape: Shape) -> str:
    """What to know of a count of parameters that no file's header confirms."""
    odd = {name for name in layer_names(text, shape.layers) if name in LINEAR_NAMES | NONE_NAMES}
    if not odd:
        return ""
    return (
        f"layers of {', '.join(sorted(odd))} are counted like attention: without safetensors headers the "
        "weights are a rough estimate"
    )


def _architecture(config: Config, text: Config) -> str:
    names = words(config.get("architectures")) or words(text.get("architectures"))
    if names:
        return names[0]
    if config.get("model_type") == "deepseek_vl_v2":  # older checkpoints leave it out
        return "DeepseekVLV2ForCausalLM"
    raise BrokenConfigError("config.json names no architectures: which model this is can't be told")


def _quantization_section(config: Config, text: Config) -> Config | None:
    found = section(config, "quantization_config", "compression_config")
    return found or section(text, "quantization_config", "compression_config")


def _dtype(config: Config, text: Config) -> str:
    for source in (text, config):
        for name in ("dtype", "torch_dtype"):
            value = source.get(name)
            if value:
                return DTYPES.get(str(value).removeprefix("torch."), "float32")
    return "float32"  # transformers saves without the field only from float32


def _shape(text: Config, config: Config, model_type: str) -> Shape:
    hidden = positive(text, "hidden_size", "n_embd", "n_embed", "d_model", "dim")
    layers = positive(
        text, "num_hidden_layers", "n_layer", "decoder_layers", "n_layers", "num_decoder_layers", "num_layers"
    )
    if layers > MOST_LAYERS:
        raise BrokenConfigError(f"{layers:,} layers are more than any model has")
    heads, kv_heads, head_dim = _heads(text, hidden)
    experts = integer(
        text, "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", default=0
    )
    intermediate = _intermediate(text, hidden)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return Shape(
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=positive(text, "vocab_size", "padded_vocab_size"),
        experts=experts,
        expert_intermediate=integer(text, "moe_intermediate_size", default=intermediate),
        tied=bool(tied) if tied is not None else model_type in TIED,
        encoder_only=model_type in ENCODER_ONLY,
        encoder_decoder=model_type in ENCODER_DECODER,
    )


def _heads(text: Config, hidden: int) -> tuple[int, int, int]:
    """Attention heads, KV heads, and values of each; one head where no layer attends."""
    names = ("num_attention_heads", "n_head", "decoder_attention_heads", "n_heads", "num_heads")
    heads = 1 if "state_size" in text and not any(n in text for n in names) else positive(text, *names)
    grouped = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads")
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        kv_heads = integer(text, "num_key_value_heads", default=1)
    elif text.get("multi_query_attention") is True:  # ChatGLM
        kv_heads = integer(text, "multi_query_group_num", default=1)
    else:
        kv_heads = integer(text, *grouped, default=heads)
    head_dim = integer(text, "head_dim", "kv_channels", "d_kv", default=0) or hidden // heads
    if min(kv_heads, head_dim) < 1:
        raise BrokenConfigError(f"{heads} heads and {kv_heads} KV heads do not share {hidden} values")
    return heads, kv_heads, head_dim


def _intermediate(text: Config, hidden: int) -> int:
    value = text.get("intermediate_size")
    if isinstance(value, list) and value:  # Gemma 3n: one for each layer, of which the widest counts
        return max(positive({"intermediate_size": each}, "intermediate_size") for each in value)
    names = ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff")
    return positive(text, *names, default=4 * hidden)


def _max_context(text: Config, config: Config) -> int:
    """Context limit after RoPE scaling, as vLLM's ``_get_and_verify_max_len`` derives it."""
    names = (
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
        "max_target_positions", "max_sequence_length", "n_ctx",
    )  # fmt: skip
    limits = [int(v) for n in names if isinstance(v := text.get(n, config.get(n)), int) and v > 0]
    limit = min(limits) if limits else 2048
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        return limit
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if kind in {None, "default", "su", "longrope", "llama3", "mrope", "dynamic"} or not isinstance(
        factor, int | float
    ):
        return limit
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings")
        limit = int(original) if isinstance(original, int) else limit
    if text.get("model_type") in {"gemma3", "gemma3_text"}:
        return limit  # the limit in the config already counts the scaling
    return int(limit * factor)


def _rope_values(text: Config, shape: Shape) -> int:
    """Entries of the cosine and sine tables: one row a position, stretched by linear scaling.

    Models with sliding layers keep a second table with a base of its own.
    """
    if shape.encoder_only or shape.encoder_decoder:
        return 0
    positions = integer(text, "max_position_embeddings", default=0)
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    width = integer(text, "qk_rope_head_dim", default=shape.head_dim) or shape.head_dim
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else None
    stretched = positions * (
        factor if kind in {"linear", "dynamic"} and isinstance(factor, int | float) else 1
    )
    local = positions if text.get("rope_local_base_freq") else 0
    return int(stretched + local) * width


@dataclass(frozen=True)
class _Layout:
    kind: AttentionKind
    window: int | None


def _attention(text: Config, shape: Shape, model_type: str) -> tuple[AttentionLayers, ...]:
    if shape.encoder_only:
        return (_layers(shape, AttentionKind.ENCODER, shape.layers),)
    if shape.encoder_decoder:
        encoder_tokens = integer(text, "max_source_positions", default=1500)
        return (
            _layers(shape, AttentionKind.FULL, shape.layers),
            _layers(shape, AttentionKind.CROSS, shape.layers, encoder_tokens),
        )
    if shape.is_mla(text):
        latent = positive(text, "kv_lora_rank") + integer(text, "qk_rope_head_dim", default=64)
        return (AttentionLayers(AttentionKind.MLA, shape.layers, 1, latent, 0),)
    counts = Counter(_layouts(text, shape.layers, model_type))
    return tuple(
        _linear_layers(text, shape, n)
        if layout.kind is AttentionKind.LINEAR
        else _layers(shape, layout.kind, n, layout.window)
        for layout, n in counts.items()
    )


def _linear_layers(text: Config, shape: Shape, count: int) -> AttentionLayers:
    wide = state_bytes(text, shape.hidden)
    narrow = state_bytes(text, shape.hidden, matrix_bytes(text))
    return AttentionLayers(AttentionKind.LINEAR, count, 1, 0, 0, None, wide, narrow)


def _layers(shape: Shape, kind: AttentionKind, count: int, window: int | None = None) -> AttentionLayers:
    return AttentionLayers(kind, count, shape.kv_heads, shape.head_dim, shape.head_dim, window)


def _layouts(text: Config, layers: int, model_type: str) -> list[_Layout]:
    """The layout of each layer, from ``layer_types`` or from the older fields."""
    window = optional(text, "sliding_window")
    names = layer_names(text, layers)
    if names:
        return [_named_layout(name, text, window) for name in names if name not in NONE_NAMES]
    if window is None or text.get("use_sliding_window") is False:
        return [_Layout(AttentionKind.FULL, None)] * layers
    pattern = optional(text, "sliding_window_pattern")
    if pattern is None and model_type == "gemma2":
        pattern = 2
    if pattern is None and model_type == "gemma3_text":
        pattern = 6
    if pattern is None:
        return [_Layout(AttentionKind.SLIDING, window)] * layers
    return [
        _Layout(AttentionKind.FULL, None)
        if (i + 1) % pattern == 0
        else _Layout(AttentionKind.SLIDING, window)
        for i in range(layers)
    ]


def _named_layout(name: str, text: Config, window: int | None) -> _Layout:
    if name == "sliding_attention" and window:
        return _Layout(AttentionKind.SLIDING, window)
    if name == "chunked_attention":
        return _Layout(AttentionKind.CHUNKED, optional(text, "attention_chunk_size"))
    if name in LINEAR_NAMES:
        return _Layout(AttentionKind.LINEAR, None)
    return _Layout(AttentionKind.FULL, None)
