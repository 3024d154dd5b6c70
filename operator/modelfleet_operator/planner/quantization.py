"""The declared quantization against what the checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.engines import version_key
from modelfleet_operator.catalog.legality import EngineRules
from modelfleet_operator.planner.facts import CheckpointQuantization, ModelFacts
from modelfleet_operator.planner.types import Rejection, Rule, VariantRequest
from modelfleet_operator.planner.weights import WeightScheme, bytes_per_weight

NAMES_BY_METHOD = {
    "awq": {"AWQ"},
    "awq_marlin": {"AWQ"},
    "auto_awq": {"AWQ"},
    "gptq": {"GPTQ"},
    "gptq_marlin": {"GPTQ"},
    "auto_gptq": {"GPTQ"},
    "auto-round": {"GPTQ", "AWQ"},
    "fp8": {"FP8"},
    "fbgemm_fp8": {"FP8"},
    "modelopt": {"FP8"},
    "modelopt_fp4": {"NVFP4"},
    "mxfp4": {"MXFP4"},
    "gpt_oss_mxfp4": {"MXFP4"},
    "bitsandbytes": {"BitsAndBytes"},
    "gguf": {"GGUF"},
}
NAMES_BY_SCHEME = {
    "w8a8-int8": {"INT8"},
    "w8a8-fp8": {"FP8"},
    "w8a8-fp8-block": {"FP8"},
    "w8a16-fp8": {"FP8"},
    "nvfp4": {"NVFP4"},
    "nvfp4a16": {"NVFP4"},
    "mxfp4": {"MXFP4"},
    "mxfp4a16": {"MXFP4"},
}
EXPERTS_ONLY = frozenset({"mxfp4", "gpt_oss_mxfp4"})
"""Methods of checkpoints that quantize nothing but routed experts (gpt-oss)."""
METHOD_ALIASES = {"auto-round": "inc", "auto_round": "inc", "gguf": "gguf"}
"""Checkpoint methods that vLLM looks up under another name."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What is to run.

    Attributes:
        label: as the user calls it.
        method: as the engine looks it up.
        weights: how they lie in memory.
        quantize_at_load: method that the engine is told to apply.
    """

    label: str
    method: str
    weights: WeightScheme
    quantize_at_load: str | None = None


def checkpoint_names(quantization: CheckpointQuantization | None) -> frozenset[str]:
    """Declarations that a checkpoint agrees with."""
    if quantization is None:
        return frozenset({"None"})
    names = set(NAMES_BY_METHOD.get(quantization.method, ()))
    if quantization.method == "compressed-tensors":
        names |= {"CompressedTensors"} | NAMES_BY_SCHEME.get(quantization.scheme, set())
    return frozenset(names or {quantization.method})


def resolve(
    request: VariantRequest, facts: ModelFacts, rules: EngineRules, version: str
) -> Declared | Rejection:
    """What runs: the checkpoint's own quantization, or one that the engine applies while it loads.

    An unquantized checkpoint with a method that the engine applies at load is planned as that; every other
    disagreement is refused with both named.
    """
    found = facts.quantization
    declared = request.quantization
    if declared in checkpoint_names(found):
        if found is None:
            return Declared("unquantized", "", WeightScheme("none", 0.0))
        return _from_checkpoint(found, declared)
    if found is None:
        at_load = rules.load_time.get(declared)
        if at_load is not None and at_load.holds(version_key(version)):
            size = 1.0 if at_load.scheme.startswith("w8") else 0.5
            return Declared(declared, at_load.method, WeightScheme(at_load.scheme, size), at_load.method)
        plugin = rules.plugins.get(declared.lower())
        if plugin is not None:
            source = f"{request.engine.type} {version}: no such method"
            return Rejection("", Rule.QUANTIZATION_NOT_SUPPORTED, plugin.message, source)
        return _mismatch(
            f"the checkpoint is not quantized, and {request.engine.type} {version} does not apply {declared} "
            f"at load: point the variant's source at a checkpoint in {declared}"
        )
    names = " or ".join(sorted(checkpoint_names(found)))
    return _mismatch(
        f"declared {declared}, but the checkpoint is {names} ({found.method}, {found.scheme}): "
        f"set quantization to {names}"
    )


def _from_checkpoint(found: CheckpointQuantization, declared: str) -> Declared:
    weights = WeightScheme(
        name=found.scheme,
        bytes_per_weight=bytes_per_weight(found),
        experts_only=found.method in EXPERTS_ONLY,
        quantizes_head=found.quantizes_head,
        quantizes_vision=found.quantizes_vision,
    )
    return Declared(declared, METHOD_ALIASES.get(found.method, found.method), weights)


def _mismatch(message: str) -> Rejection:
    return Rejection("", Rule.QUANTIZATION_MISMATCH, message, "quantization_config of the checkpoint")
