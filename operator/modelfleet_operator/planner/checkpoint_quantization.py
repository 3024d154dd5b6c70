"""Reading a checkpoint's ``quantization_config``: method, bits, groups and what is left alone.

The method names are those that vLLM and SGLang look up (``quant_method``); ``scheme`` is ours, one word for
how weights and activations are kept, so that legality and memory don't depend on the producing tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelfleet_operator.planner.facts import CheckpointQuantization
from modelfleet_operator.planner.fields import BrokenConfigError, Config, integer, words


def parse_quantization(config: Config | None) -> CheckpointQuantization | None:
    """What a ``quantization_config`` says; ``None`` for checkpoints without one.

    Raises:
        BrokenConfigError: there is one, but it names no method.
    """
    if config is None:
        return None
    method = str(config.get("quant_method") or "").lower()
    if not method and "quantization" in config:  # ModelOpt's own layout
        inner = config["quantization"]
        return _modelopt(inner if isinstance(inner, Mapping) else {})
    if not method:
        if "config_groups" in config:
            method = "compressed-tensors"
        elif config.get("quant_algo"):
            return _modelopt(config)
        else:
            raise BrokenConfigError("quantization_config names no quant_method")
    parse = _PARSERS.get(method)
    return parse(config) if parse else CheckpointQuantization(method=method, scheme="unknown", bits=16)


def _ignored(config: Config) -> tuple[str, ...]:
    for name in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "exclude"):
        if config.get(name):
            return words(config[name])
    return ()


def _weight_only(config: Config) -> CheckpointQuantization:
    """AWQ, GPTQ and their kin: integer weights, 16-bit activations."""
    bits = integer(config, "bits", "w_bit", default=4)
    group = integer(config, "group_size", "q_group_size", default=128)
    zero_point = config.get("zero_point")
    symmetric = bool(config.get("sym", zero_point is False))
    return CheckpointQuantization(
        method=str(config["quant_method"]).lower(),
        scheme=f"w{bits}a16",
        bits=bits,
        group_size=group if group > 0 else None,
        symmetric=symmetric,
        quantizes_head=bool(config.get("lm_head", False)),
        ignored=_ignored(config),
    )


def _fp8(config: Config) -> CheckpointQuantization:
    block = config.get("weight_block_size")
    shape = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
    return CheckpointQuantization(
        method=str(config["quant_method"]).lower(),
        scheme="w8a8-fp8-block" if shape else "w8a8-fp8",
        bits=8,
        block=shape,
        ignored=_ignored(config),
    )


def _compressed_tensors(config: Config) -> CheckpointQuantization:
    groups = config.get("config_groups")
    schemes = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    if not schemes:
        raise BrokenConfigError("quantization_config of compressed-tensors has no config_groups")
    weights = [g["weights"] for g in schemes if isinstance(g.get("weights"), Mapping)]
    if not weights:
        raise BrokenConfigError("quantization_config of compressed-tensors quantizes no weights")
    widest = max(weights, key=lambda w: integer(w, "num_bits", default=8))
    bits = integer(widest, "num_bits", default=8)
    kind = str(widest.get("type", "int"))
    activations = next((g.get("input_activations") for g in schemes if g.get("input_activations")), None)
    block = widest.get("block_structure")
    group = widest.get("group_size")
    ignored = _ignored(config)
    return CheckpointQuantization(
        method="compressed-tensors",
        scheme=_tensor_scheme(bits, kind, activations, block=bool(block), group=group),
        bits=bits,
        group_size=int(group) if isinstance(group, int) and group > 0 else None,
        symmetric=bool(widest.get("symmetric", True)),
        block=(int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None,
        quantizes_head=not any("lm_head" in name for name in ignored),
        ignored=ignored,
    )


def _tensor_scheme(bits: int, kind: str, activations: Any, *, block: bool, group: object) -> str:
    if kind == "float" and bits == 4:
        base = "mxfp4" if group == 32 else "nvfp4"
        return base if isinstance(activations, Mapping) else f"{base}a16"
    if not isinstance(activations, Mapping):
        return f"w{bits}a16-fp8" if kind == "float" else f"w{bits}a16"
    act_bits = integer(activations, "num_bits", default=8)
    suffix = "fp8" if str(activations.get("type", "int")) == "float" else "int8"
    scheme = f"w{bits}a{act_bits}-{suffix}"
    return f"{scheme}-block" if block and scheme == "w8a8-fp8" else scheme


def _modelopt(config: Config) -> CheckpointQuantization:
    algorithm = str(config.get("quant_algo") or "").upper()
    ignored = _ignored(config)
    if "NVFP4" in algorithm or "FP4" in algorithm:
        return CheckpointQuantization("modelopt_fp4", "nvfp4", 4, group_size=16, ignored=ignored)
    if algorithm == "MXFP8":
        return CheckpointQuantization("modelopt_mxfp8", "mxfp8", 8, group_size=32, ignored=ignored)
    if algorithm.startswith("FP8"):
        return CheckpointQuantization("modelopt", "w8a8-fp8", 8, ignored=ignored)
    raise BrokenConfigError(f"quantization_config has the unknown quant_algo {algorithm or 'none'}")


def _bitsandbytes(config: Config) -> CheckpointQuantization:
    bits = 8 if config.get("load_in_8bit") else 4
    return CheckpointQuantization(
        "bitsandbytes",
        f"w{bits}a16-bnb",
        bits,
        group_size=64 if bits == 4 else None,
        ignored=words(config.get("llm_int8_skip_modules")),
    )


def _mxfp4(config: Config) -> CheckpointQuantization:
    return CheckpointQuantization("mxfp4", "mxfp4a16", 4, group_size=32, ignored=_ignored(config))


_PARSERS = {
    "awq": _weight_only,
    "gptq": _weight_only,
    "awq_marlin": _weight_only,
    "gptq_marlin": _weight_only,
    "auto-round": _weight_only,
    "auto_round": _weight_only,
    "moe_wna16": _weight_only,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
