"""Models whose layers are not all attention: which layer is what, and the state that the others keep.

State-space layers, gated delta nets and short convolutions keep a state of fixed size for each sequence, as
vLLM's ``MambaStateShapeCalculator`` lays it out: a matrix, and the convolution's last inputs in the model's
16-bit type. The matrix is float32, or what the engine makes of the model's own type (:func:`matrix_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modelfleet_operator.planner.fields import BrokenConfigError, Config, integer, words

LINEAR_NAMES: Final = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent"})
"""Names of layers with a state of fixed size, as configs write them."""
NONE_NAMES: Final = frozenset({"mlp", "moe"})
"""Names of layers that keep nothing of a sequence."""
_PATTERN: Final[Mapping[str, str]] = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Letters of ``hybrid_override_pattern`` (Nemotron-H)."""
_STATE_BYTES: Final = 4
_DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
_CONVOLUTION_BYTES: Final = 2


def layer_names(text: Config, layers: int) -> tuple[str, ...]:
    """Name of each layer in the words of ``layer_types``; empty where all are alike."""
    for field in ("layer_types", "layers_block_type"):
        if names := words(text.get(field)):
            return names[:layers]
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        unknown = sorted(set(pattern) - _PATTERN.keys())
        if unknown:
            raise BrokenConfigError(f"hybrid_override_pattern has unknown letters: {' '.join(unknown)}")
        return tuple(_PATTERN[letter] for letter in pattern[:layers])
    attending = _attending(text, layers)
    if attending is None:
        return ()
    return tuple("full_attention" if i in attending else "linear_attention" for i in range(layers))


def _attending(text: Config, layers: int) -> frozenset[int] | None:
    """Numbers of the layers that attend; ``None`` where all do."""
    if isinstance(kinds := text.get("attn_type_list"), list):  # MiniMax: 1 attends, 0 is linear
        return frozenset(i for i, kind in enumerate(kinds[:layers]) if kind == 1)
    for field in ("attn_layer_indices", "full_attn_idxs"):  # Bamba, LFM2
        if isinstance(found := text.get(field), list):
            return frozenset(i for i in found if isinstance(i, int))
    if every := integer(text, "full_attention_interval", default=0):  # Qwen3-Next
        return frozenset(i for i in range(layers) if (i + 1) % every == 0)
    if every := integer(text, "attn_layer_period", default=0):  # Jamba
        first = integer(text, "attn_layer_offset", default=0)
        return frozenset(i for i in range(layers) if i % every == first % every)
    if "num_attention_heads" not in text and "state_size" in text:  # Mamba
        return frozenset()
    return None


def matrix_bytes(text: Config) -> int:
    """Bytes of a value of the matrix in vLLM: of the model's type, unless a family says otherwise.

    ``MambaStateDtypeCalculator`` and ``models/config.py``: Nemotron-H takes ``mamba_ssm_cache_dtype``, by
    default float32; Qwen3.5 takes ``mamba_ssm_dtype``; Kimi's delta attention is always float32.
    """
    model_type = str(text.get("model_type") or "")
    if model_type.startswith("nemotron_h"):
        named = text.get("mamba_ssm_cache_dtype") or "float32"
    elif model_type.startswith("kimi"):
        named = "float32"
    else:
        asked = text.get("mamba_ssm_dtype") if model_type.startswith("qwen3_5") else None
        named = asked or text.get("dtype") or text.get("torch_dtype") or "float32"
    return _DTYPE_BYTES.get(str(named).removeprefix("torch."), _STATE_BYTES)


def state_bytes(text: Config, hidden: int, matrix: int = _STATE_BYTES) -> int:
    """Bytes that one layer without attention keeps for each sequence, with ``matrix`` bytes a value."""
    if isinstance(text.get("attn_type_list"), list):  # lightning attention: a matrix per head
        heads = integer(text, "num_attention_heads")
        width = integer(text, "head_dim", default=hidden // max(heads, 1))
        return heads * width * width * matrix
    if "conv_L_cache" in text:  # LFM2: nothing but a short convolution
        return (integer(text, "conv_L_cache") - 1) * hidden * _CONVOLUTION_BYTES
    if any(name in text for name in ("state_size", "ssm_state_size", "mamba_d_state")):
        return _mamba(text, hidden, matrix)
    return _gated_delta_net(text, matrix)


def _mamba(text: Config, hidden: int, matrix: int) -> int:
    size = integer(text, "ssm_state_size", "mamba_d_state", "state_size")
    kernel = integer(text, "mamba_d_conv", "conv_kernel", "mamba_conv_kernel", default=4)
    heads = integer(text, "mamba_num_heads", "mamba_n_heads", default=0)
    expand = integer(text, "mamba_expand", "expand", default=2)
    inner = heads * integer(text, "mamba_head_dim", "mamba_d_head", default=64) if heads else expand * hidden
    groups = integer(text, "n_groups", "mamba_n_groups", default=1) if heads else 0
    convolution = (kernel - 1) * (inner + 2 * groups * size) * _CONVOLUTION_BYTES
    return inner * size * matrix + convolution


def _gated_delta_net(text: Config, matrix: int) -> int:
    key_dim = integer(text, "linear_key_head_dim", default=128)
    value_dim = integer(text, "linear_value_head_dim", default=128)
    key_heads = integer(text, "linear_num_key_heads", default=16)
    value_heads = integer(text, "linear_num_value_heads", default=32)
    kernel = integer(text, "linear_conv_kernel_dim", default=4)
    inputs = 2 * key_heads * key_dim + value_heads * value_dim
    return value_heads * key_dim * value_dim * matrix + (kernel - 1) * inputs * _CONVOLUTION_BYTES
