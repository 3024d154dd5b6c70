"""Memory of one rank: weights, KV cache and everything else.

The sum that every figure here serves::

    memory * share  =  weights + overhead + KV cache

``memory * share`` is what the engine takes; the KV cache gets what is left. :mod:`.kv_cache` turns it into
tokens as the engine does. Figures are bytes unless the name says GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.catalog.engines import EngineDefaults
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.kv_cache import KVLayout
from modelfleet_operator.planner.overhead import Overhead, estimate_overhead
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
    """

    memory: float
    share: float
    weights: float
    overhead: Overhead
    kv_cache: float
    layout: KVLayout
    batch: Batch

    def lines(self) -> tuple[str, ...]:
        """The sum for people, one summand a line."""
        usable = self.memory * self.share
        head = f"{_gib(self.memory)} x {self.share:.2f} = {_gib(usable)} usable"
        if self.share == 1.0:
            head = f"{_gib(usable)} usable"
        parts = [head, f"- {_gib(self.weights)} weights"]
        parts += [f"- {_gib(size)} {name}" for name, size in self.overhead.parts() if size >= 0.005 * GIB]
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
    kv_dtype_bytes: float,
    max_model_len: int,
    layout: KVLayout,
) -> Footprint:
    """Memory of one rank of a replica with the settings' tensor and pipeline parallel sizes."""
    batch = batch_of(settings, defaults, accelerator, max_model_len)
    weights = weights_per_rank(facts, scheme, settings, dtype_bytes)
    overhead = estimate_overhead(
        facts, settings, defaults, accelerator,
        batch_tokens=batch.tokens, batch_sequences=batch.sequences, dtype_bytes=dtype_bytes,
        max_model_len=max_model_len, scheme=scheme,
    )  # fmt: skip
    memory = memory_gib * GIB
    if settings.kv_cache_memory_bytes is not None:
        share = 1.0
        kv_cache = float(settings.kv_cache_memory_bytes)
    else:
        share = (settings.gpu_memory_percent or defaults.memory_percent) / 100
        kv_cache = memory * share - weights - overhead.total
    return Footprint(memory, share, weights, overhead, kv_cache, layout, batch)


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
