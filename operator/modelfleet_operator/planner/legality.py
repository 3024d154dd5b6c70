"""Whether an engine can run a quantization on an accelerator, and how; each verdict with its source."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.types import Rejection, Rule, VariantRequest
from modelfleet_operator.planner.weights import WeightScheme, bytes_per_weight


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it runs.

    Attributes:
        scheme: how the weights lie in memory.
        dtype: of activations and unquantized weights.
        kv_cache_dtype: of the KV cache.
        kv_dtype_bytes: bytes of one of its values.
        quantize_at_load: method that the engine applies to an unquantized checkpoint.
        notes: what the user should know.
    """

    scheme: WeightScheme
    dtype: str
    kv_cache_dtype: str
    kv_dtype_bytes: float
    quantize_at_load: str | None = None
    notes: tuple[str, ...] = ()


def judge(request: VariantRequest, facts: ModelFacts, accelerator: Accelerator) -> Verdict | Rejection:
    """How the variant runs on the accelerator, or the rule that forbids it."""
    dtype = request.engine.dtype or facts.dtype
    notes: tuple[str, ...] = ()
    if dtype not in accelerator.dtypes:
        if request.engine.dtype:
            return Rejection(accelerator.name, Rule.DTYPE_NOT_SUPPORTED, f"{dtype} is not native here")
        dtype, notes = "float16", (f"{accelerator.name} has no {dtype}: runs in float16",)
    quantization = facts.quantization
    if quantization is None:
        scheme = WeightScheme("none", 0)
    else:
        scheme = WeightScheme(quantization.scheme, bytes_per_weight(quantization))
    return Verdict(scheme, dtype, dtype, 2.0, None, notes)
