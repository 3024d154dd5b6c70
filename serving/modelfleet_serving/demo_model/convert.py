"""GGUF to two checkpoints an engine serves: plain bf16, and int8 W8A8 in the compressed-tensors format.

Run as a script by the interpreter of an engine environment, which has torch and transformers and does
not have this package; so it imports nothing of ours, and torch only inside the functions that need it.
Its last line on standard output is JSON: ``{"bf16": DIR, "w8a8": DIR}``.

The int8 scheme is the plain one of the format's definition: symmetric round-to-nearest weights with one
scale per output channel, activations quantized per token at run time. It needs no calibration data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

INT8_MAX: Final = 127
UNQUANTIZED: Final = ("embed_tokens", "lm_head")
"""Modules kept in bf16: rows of an embedding are looked up, and the output layer decides between tokens."""


def quantize_per_channel(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight matrix to int8 with one scale per output channel.

    Args:
        weight: Shape (output, input), finite.

    Returns:
        The int8 matrix and the scales, shape (output, 1): ``weight ~ quantized * scale``, off by at most
        half a scale per element. A channel of zeros gets scale 1.

    Raises:
        ValueError: The weight is not a matrix, or holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {weight.shape}")
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    peak = np.abs(weight).max(axis=1, keepdims=True, initial=0.0)
    # The smallest subnormal divided by 127 is zero: such a channel counts as zeros.
    scale = np.where(peak / INT8_MAX > 0, peak / INT8_MAX, 1.0).astype(np.float32)
    quantized = np.clip(np.rint(weight / scale), -INT8_MAX, INT8_MAX).astype(np.int8)
    return quantized, scale


def is_quantized(name: str, ndim: int) -> bool:
    """Whether the tensor is the weight of a linear layer that the int8 variant quantizes."""
    parts = name.split(".")
    return parts[-1] == "weight" and ndim == 2 and not any(part in UNQUANTIZED for part in parts)


def w8a8_config(config: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the int8 variant of a model with this ``config.json``."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
        "ignore": ["lm_head"],
    }
    return {**config, "quantization_config": quantization}


def write_bf16(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF into a bf16 checkpoint directory with its tokenizer and chat template."""
    import torch  # noqa: PLC0415 - only the engine's environment has it
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: PLC0415

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    # The loader leaves the GGUF's own quantization on the model; what is saved here is plain bf16.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    generation: Any = GenerationConfig
    model.generation_config = generation(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_w8a8(bf16: Path, out: Path) -> None:
    """Quantize a bf16 checkpoint directory into an int8 one."""
    import torch  # noqa: PLC0415 - only the engine's environment has it
    from safetensors import safe_open  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    shutil.copytree(bf16, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.index.json"))
    tensors = {}
    for shard in sorted(bf16.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if not is_quantized(name, tensor.ndim):
                    tensors[name] = tensor
                    continue
                quantized, scale = quantize_per_channel(tensor.to(torch.float32).numpy())
                tensors[name] = torch.from_numpy(quantized)
                tensors[f"{name}_scale"] = torch.from_numpy(scale)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((bf16 / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(w8a8_config(config), indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Convert, with a line of progress per step on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory that gets both checkpoints")
    parser.add_argument("--name", required=True, help="directory names are NAME-bf16 and NAME-w8a8")
    arguments = parser.parse_args(argv)
    bf16 = arguments.out / f"{arguments.name}-bf16"
    w8a8 = arguments.out / f"{arguments.name}-w8a8"
    print(f"dequantizing {arguments.gguf.name} to bf16", file=sys.stderr, flush=True)
    write_bf16(arguments.gguf, bf16)
    print("quantizing the bf16 weights to int8", file=sys.stderr, flush=True)
    write_w8a8(bf16, w8a8)
    print(json.dumps({"bf16": str(bf16), "w8a8": str(w8a8)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
