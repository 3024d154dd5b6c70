"""Bytes of the weights that one rank loads."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.planner.facts import CheckpointQuantization, ModelFacts
from modelfleet_serving.contract import EngineSettings

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 2**20
REPACKING_WASTE = 0.12
"""Share of their 20 MiB segments that 4-bit weights leave unused after they were repacked; fitted."""
VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this (``vocab_parallel_embedding.py``)."""


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How quantized weights lie in memory.

    Attributes:
        name: canonical scheme: ``w4a16``, ``w8a8-fp8``, ... or ``none``.
        bytes_per_weight: of a quantized weight with its scales and zero points.
        experts_only: only routed experts are quantized.
        quantizes_head: the output head is quantized too.
        quantizes_vision: the vision tower is quantized too.
        compute: how it is computed with: for people, such as ``W8A16 (Marlin)``.
    """

    name: str
    bytes_per_weight: float
    experts_only: bool = False
    quantizes_head: bool = False
    quantizes_vision: bool = False
    compute: str = ""


def bytes_per_weight(quantization: CheckpointQuantization) -> float:
    """Bytes of one quantized weight with its scales and zero points."""
    bits = quantization.bits
    group = quantization.group_size
    scheme = quantization.scheme
    if scheme.startswith(("mxfp4", "mxfp8")):
        bits += 8 / 32  # one shared exponent a block of 32
    elif scheme.startswith("nvfp4"):
        bits += 8 / 16  # one FP8 scale a block of 16
    elif scheme.endswith("-bnb"):
        bits += 32 / (group or 64) if quantization.bits == 4 else 0
    elif group:
        bits += 16 / group  # one 16-bit scale a group
        if not quantization.symmetric:
            bits += quantization.bits / group
    elif quantization.block:
        bits += 32 / (quantization.block[0] * quantization.block[1])
    return bits / 8


def weights_per_rank(
    facts: ModelFacts, scheme: WeightScheme, settings: EngineSettings, dtype_bytes: int
) -> float:
    """Bytes of the weights on the fullest rank.

    Linear layers, experts and embeddings are split by tensor and pipeline parallelism; MLA's down
    projections and routers are held whole by each rank of a stage. Where safetensors headers were read and
    nothing is quantized at load, their sum replaces the arithmetic's total.
    """
    p = facts.parameters
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    quantized = scheme.bytes_per_weight if scheme.name != "none" else dtype_bytes
    linear_bytes = dtype_bytes if scheme.experts_only else quantized
    layers = p.linear * linear_bytes + p.expert * quantized
    replicated = p.replicated_quantized * linear_bytes + (p.replicated - p.replicated_quantized) * dtype_bytes
    embedding = _padded(p.embedding, facts) * dtype_bytes
    head = _padded(p.head, facts) * (quantized if scheme.quantizes_head else dtype_bytes)
    vision = p.vision * (quantized if scheme.quantizes_vision else dtype_bytes)
    other = p.other * dtype_bytes
    total = layers + replicated + embedding + head + vision + other
    scale = _measured_scale(facts, scheme, total, dtype_bytes)
    # Embedding and head sit on the first and the last stage; with one stage both on it.
    ends = (embedding + head) / tp if pp == 1 else max(embedding, head) / tp
    beside = facts.rope_values * dtype_bytes + _rounding(facts, linear_bytes, settings)
    return beside + scale * (layers / (tp * pp) + replicated / pp + ends + vision / tp + other / pp)


def _rounding(facts: ModelFacts, weight_bytes: float, settings: EngineSettings) -> float:
    """What torch's allocator adds: segments of 2 MiB for tensors from 10 MiB on, of 20 MiB for smaller ones.

    (PyTorch ``c10/cuda/CUDACachingAllocator``: kMinLargeAlloc, kRoundLarge, kLargeBuffer.)
    """
    h = facts.hidden_size
    queries = facts.heads * facts.head_dim
    wide = facts.dense_intermediate_size
    shapes = (h * (queries + 2 * facts.kv_heads * facts.head_dim), queries * h, 2 * wide * h, wide * h)
    waste = 0.0
    for values in shapes:
        size = values * weight_bytes / settings.tensor_parallel_size
        if size >= 10 * MIB:
            # Other tensors find room in half of it; not so after repacking, which leaves holes behind.
            waste += -size % (2 * MIB) * (1.0 if weight_bytes < 1 else 0.5)
        elif weight_bytes < 1:
            waste += size * REPACKING_WASTE
    return waste * facts.layers / settings.pipeline_parallel_size


def _padded(parameters: int, facts: ModelFacts) -> int:
    if not parameters:
        return 0
    vocab = -(-facts.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    return parameters // facts.vocab_size * vocab


def _measured_scale(facts: ModelFacts, scheme: WeightScheme, total: float, dtype_bytes: int) -> float:
    """Ratio of the checkpoint's tensors, as they will lie in memory, to the arithmetic's total."""
    if not facts.tensor_bytes or total <= 0:
        return 1.0
    if facts.quantization is None and scheme.name != "none":
        return 1.0  # quantized at load: the checkpoint's bytes are not what lies in memory
    loaded = 0.0
    for dtype, size in facts.tensor_bytes.items():
        factor = dtype_bytes / {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, dtype_bytes)
        loaded += size * (factor if facts.quantization is None or dtype in {"F16", "BF16"} else 1.0)
    return loaded / total
