"""Image and audio encoders beside a language model: their size, and the tokens that one item takes."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.planner.facts import Vision
from modelfleet_operator.planner.fields import Config, integer, optional, section

VL2_MAX_TILES = 9
VL2_TOKENS_PER_SIDE = 14
QWEN_MAX_IMAGE_TOKENS = 16384
"""``max_pixels`` 12,845,056 of the Qwen-VL preprocessors, at 28x28 pixels a token."""


@dataclass(frozen=True)
class ParsedVision:
    """An encoder and the number of its parameters, projector included."""

    facts: Vision
    parameters: int


def parse_vision(config: Config, text: Config) -> ParsedVision | None:
    """The encoder of a multimodal config; ``None`` for text-only models."""
    vision = section(config, "vision_config")
    if vision is None:
        return None
    model_type = str(config.get("model_type", ""))
    hidden = integer(text, "hidden_size", default=0)
    if model_type in {"deepseek_vl_v2", "deepseek_ocr", "deepseek_ocr2"}:
        return _deepseek_vl2(vision, section(config, "projector_config") or {}, hidden)
    if model_type.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni")):
        return _qwen(vision, hidden, model_type)
    if model_type in {"internvl_chat", "internvl"}:
        return _internvl(config, vision, hidden)
    return _plain(config, vision, hidden)


def vl2_image_tokens(tiles_high: int, tiles_wide: int) -> int:
    """Tokens of one image of DeepSeek-VL2: a global view, a separator, and its tiles.

    14x14 tokens a tile after the 2x2 pixel shuffle, and one newline token a row (DeepSeek-VL2,
    ``modeling_deepseek_vl_v2.py``): 421 for one tile, 2,101 at most for nine in a row of heights.
    """
    side = VL2_TOKENS_PER_SIDE
    return side * (side + 1) + 1 + tiles_high * side * (tiles_wide * side + 1)


def _vit_parameters(layers: int, hidden: int, intermediate: int, *, patch_inputs: int, positions: int,
                    gated: bool = False) -> int:  # fmt: skip
    layer = 4 * hidden * hidden + (3 if gated else 2) * hidden * intermediate + 9 * hidden + intermediate
    return layers * layer + hidden * (patch_inputs + positions + 3)


def _deepseek_vl2(vision: Config, projector: Config, hidden: int) -> ParsedVision:
    """SigLIP so400m at 384 pixels (27 layers of 1152, MLP 4304) and a downsampling projector."""
    width = integer(vision, "width", default=1152) if isinstance(vision.get("width"), int) else 1152
    layers = integer(vision, "layers", default=27)
    intermediate = 4304
    patches = 27 * 27
    parameters = _vit_parameters(layers, width, intermediate, patch_inputs=3 * 14 * 14, positions=patches)
    n_embed = integer(projector, "n_embed", default=hidden)
    ratio = integer(projector, "downsample_ratio", default=2)
    parameters += width * ratio * ratio * n_embed + n_embed * n_embed + 4 * n_embed
    longest = max(vl2_image_tokens(high, VL2_MAX_TILES // high) for high in range(1, VL2_MAX_TILES + 1))
    facts = Vision(
        layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        heads=integer(vision, "heads", default=16),
        max_item_tokens=longest,
        encoder_tokens=(VL2_MAX_TILES + 1) * patches,
    )
    return ParsedVision(facts, parameters)


def _qwen(vision: Config, hidden: int, model_type: str) -> ParsedVision:
    layers = integer(vision, "depth", "num_hidden_layers", default=32)
    first = model_type.startswith("qwen2_vl")
    width = (
        integer(vision, "embed_dim", default=1280) if first else integer(vision, "hidden_size", default=1280)
    )
    intermediate = 4 * width if first else integer(vision, "intermediate_size", default=3420)
    patch = integer(vision, "patch_size", "spatial_patch_size", default=14)
    merge = integer(vision, "spatial_merge_size", default=2)
    gated = model_type.startswith(("qwen2_5_vl", "qwen2_5_omni"))
    positions = integer(vision, "num_position_embeddings", default=0)
    inputs = 3 * 2 * patch * patch  # two frames a patch
    parameters = _vit_parameters(
        layers, width, intermediate, patch_inputs=inputs, positions=positions, gated=gated
    )
    merged = width * merge * merge
    mergers = 1 + len(vision.get("deepstack_visual_indexes") or ())
    parameters += mergers * (merged * merged + merged * hidden)
    facts = Vision(
        layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        heads=integer(vision, "num_heads", "num_attention_heads", default=16),
        max_item_tokens=QWEN_MAX_IMAGE_TOKENS,
        encoder_tokens=QWEN_MAX_IMAGE_TOKENS * merge * merge,
    )
    return ParsedVision(facts, parameters)


def _internvl(config: Config, vision: Config, hidden: int) -> ParsedVision:
    layers = integer(vision, "num_hidden_layers", default=24)
    width = integer(vision, "hidden_size", default=1024)
    intermediate = integer(vision, "intermediate_size", default=4 * width)
    patch = _square(vision, "patch_size", 14)
    image = _square(vision, "image_size", 448)
    patches = (image // patch) ** 2
    shrink = 4  # pixel shuffle by 0.5 in both directions
    tiles = integer(config, "max_dynamic_patch", default=12) + 1
    parameters = _vit_parameters(
        layers, width, intermediate, patch_inputs=3 * patch * patch, positions=patches + 1
    )
    parameters += width * shrink * hidden + hidden * hidden
    facts = Vision(
        layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        heads=integer(vision, "num_attention_heads", default=16),
        max_item_tokens=tiles * patches // shrink + 2,
        encoder_tokens=tiles * (patches + 1),
    )
    return ParsedVision(facts, parameters)


def _plain(config: Config, vision: Config, hidden: int) -> ParsedVision:
    """A ViT whose patches go through a small projector: Gemma 3, LLaVA, Mistral 3, Llama 4."""
    layers = integer(vision, "num_hidden_layers", "layers", "depth", default=27)
    width = integer(vision, "hidden_size", "width", "embed_dim", default=1152)
    intermediate = integer(vision, "intermediate_size", default=4 * width)
    patch = _square(vision, "patch_size", 14)
    image = _square(vision, "image_size", 384)
    patches = max((image // patch) ** 2, 1)
    merge = integer(config, "spatial_merge_size", default=1)
    tokens = optional(config, "mm_tokens_per_image") or patches // (merge * merge)
    gated = str(vision.get("model_type")) == "pixtral"
    parameters = _vit_parameters(layers, width, intermediate, patch_inputs=3 * patch * patch,
                                 positions=0 if gated else patches, gated=gated)  # fmt: skip
    parameters += width * merge * merge * hidden + (hidden * hidden if merge > 1 else 0)
    facts = Vision(
        layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        heads=integer(vision, "num_attention_heads", "heads", default=16),
        max_item_tokens=tokens,
        encoder_tokens=patches,
    )
    return ParsedVision(facts, parameters)


def _square(config: Config, name: str, default: int) -> int:
    value = config.get(name)
    if isinstance(value, list) and value:
        return int(value[0])
    return integer(config, name, default=default)
