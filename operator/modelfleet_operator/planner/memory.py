"""Memory of one rank: weights, KV cache and everything else.

The sum that every figure here serves::

    memory * share  =  weights + overhead + allowance + KV cache

``memory * share`` is what the engine takes; the allowance is for what the sum does not know, and the KV cache
gets what is left. :mod:`.kv_cache` turns it into
tokens as the engine does. Figures are bytes unless the name says GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.catalog.engines import EngineDefaults
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.kv_cache import KVLayout
from modelfleet_operator.planner.overhead import Overhead, Step, allowance, estimate_overhead, lora_bytes
from modelfleet_operator.planner.types import GIB
from modelfleet_operator.planner.weights import WeightScheme, weights_per_rank
from modelfleet_serving.contract import EngineSettings


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of the engine."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one rank of a replica needs, and what is left for the KV cache.

    Attributes:
        memory: of the accelerator as the engine sees it.
        share: of it that the engine takes, 0..1.
        weights: of this rank.
        overhead: activations, graphs and the rest.
        kv_cache: what is left; negative where nothing is.
        layout: how the KV cache is laid out.
        batch: one step of the engine.
        counted: overhead inside the share; all of it unless the engine keeps it outside.
        allowance: set aside for what the sum does not know.
    """

    memory: float
    share: float
    weights: float
    overhead: Overhead
    kv_cache: float
    layout: KVLayout
    batch: Batch
    counted: float | None = None
    allowance: float = 0.0

    def lines(self) -> tuple[str, ...]:
        """The sum for people, one summand a line."""
        usable = self.memory * self.share
        head = f"{_gib(self.memory)} x {self.share:.2f} = {_gib(usable)} usable"
        if self.share == 1.0:
            head = f"{_gib(usable)} usable"
        parts = [head, f"- {_gib(self.weights)} weights"]
        inside = self.counted is None or self.counted == self.overhead.total
        if inside:
            parts += [f"- {_gib(size)} {name}" for name, size in self.overhead.parts() if size >= 0.005 * GIB]
        else:
            beside = "activations and runtime; the rest lies outside of the share"
            parts.append(f"- {_gib(self.counted or 0.0)} of {_gib(self.overhead.total)} {beside}")
        if self.allowance:
            parts.append(f"- {_gib(self.allowance)} for what this sum does not know")
        parts.append(f"= {_gib(self.kv_cache)} for the KV cache")
        parts.append(self.layout.explain())
        return tuple(parts)


def footprint(
    facts: ModelFacts,
    scheme: WeightScheme,
    settings: EngineSettings,
    defaults: EngineDefaults,
    accelerator: Accelerator,
    *,
    memory_gib: float,
    dtype_bytes: int,
    batch: Batch,
    layout: KVLayout,
    generates: bool,
) -> Footprint:
    """Memory of one rank of a replica with the settings' tensor and pipeline parallel sizes."""
    weights = weights_per_rank(facts, scheme, settings, dtype_bytes) + lora_bytes(
        facts, settings, dtype_bytes
    )
    step = Step(
        tokens=batch.tokens,
        sequences=batch.sequences,
        dtype_bytes=dtype_bytes,
        tensor_parallel=settings.tensor_parallel_size,
        eager=is_eager(settings),
        generates=generates,
        quantized_bytes=1 if scheme.compute.startswith("W8A8") else 0,
    )
    overhead = estimate_overhead(facts, settings, defaults, accelerator, step)
    memory = memory_gib * GIB
    plain = scheme.name == "none" and settings.lora is None
    unknown = 0.0 if accelerator.is_cpu else allowance(facts, weights, overhead, plain=plain)
    if settings.kv_cache_memory_bytes is not None:
        kv_cache = float(settings.kv_cache_memory_bytes)
        return Footprint(memory, 1.0, weights, overhead, kv_cache, layout, batch, allowance=unknown)
    share = _share(settings, defaults, accelerator, memory_gib)
    counted = overhead.total
    if defaults.static_share:
        # What does not fit beside the share is taken from it.
        counted = max(counted - (1 - share) * memory, 0.0)
    kv_cache = memory * share - weights - counted - unknown
    return Footprint(memory, share, weights, overhead, kv_cache, layout, batch, counted, unknown)


def _share(
    settings: EngineSettings, defaults: EngineDefaults, accelerator: Accelerator, memory_gib: float
) -> float:
    """Share of the GPU that the engine takes, 0..1."""
    if settings.gpu_memory_percent is None and defaults.reserve is not None:
        ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
        return defaults.reserve.share(memory_gib, defaults.batch_for(accelerator), ranks)
    return (settings.gpu_memory_percent or defaults.memory_percent) / 100


def is_eager(settings: EngineSettings) -> bool:
    """Whether compilation and CUDA graphs are turned off."""
    return any(
        settings.args.get(name) is True for name in ("enforce-eager", "enforce_eager", "disable-cuda-graph")
    )


def batch_of(
    settings: EngineSettings, defaults: EngineDefaults, accelerator: Accelerator, max_model_len: int
) -> Batch:
    """Tokens and sequences of a step, as the engine derives them from its settings."""
    usual = defaults.batch_for(accelerator)
    sequences = settings.max_num_seqs or usual.sequences
    tokens = settings.max_num_batched_tokens
    if tokens is None:
        tokens = usual.tokens
        if settings.chunked_prefill is False:
            tokens = max(tokens, max_model_len)
        tokens = min(tokens, sequences * max_model_len)
    if settings.max_num_seqs is None:
        sequences = min(sequences, tokens)
    return Batch(tokens, sequences)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
