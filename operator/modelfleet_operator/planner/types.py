"""What the planner is asked and what it answers. Sizes are in GiB (2**30 bytes) unless the name says else."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from modelfleet_operator.planner.facts import ModelFacts, ModelUnavailable
from modelfleet_serving.contract import EngineSettings, ReplicaResources, Task

GIB: Final = 2**30

SIMULATOR: Final = "Simulator"


class Rule(enum.StrEnum):
    """Why an accelerator or a whole variant is refused. Stable words: they stand in status."""

    # The model
    MODEL_UNAVAILABLE = "ModelUnavailable"
    READING_MODEL = "ReadingModel"
    PLANNER_FAILED = "PlannerFailed"
    ARCHITECTURE_NOT_SUPPORTED = "ArchitectureNotSupported"
    ADAPTERS_NOT_SUPPORTED = "AdaptersNotSupported"
    QUANTIZATION_MISMATCH = "QuantizationMismatch"
    CONTEXT_TOO_LONG = "ContextTooLong"
    # The engine on the accelerator
    ACCELERATOR_UNKNOWN = "AcceleratorUnknown"
    ENGINE_NOT_SUPPORTED = "EngineNotSupported"
    ENGINE_SETTINGS = "EngineSettingsReserved"
    COMPUTE_CAPABILITY = "ComputeCapability"
    QUANTIZATION_NOT_SUPPORTED = "QuantizationNotSupported"
    DTYPE_NOT_SUPPORTED = "DtypeNotSupported"
    KV_CACHE_DTYPE_NOT_SUPPORTED = "KVCacheDtypeNotSupported"
    ATTENTION_NOT_SUPPORTED = "AttentionNotSupported"
    # Sizes
    TENSOR_PARALLEL = "TensorParallelSize"
    WEIGHTS_DO_NOT_FIT = "WeightsDoNotFit"
    KV_CACHE_DOES_NOT_FIT = "KVCacheDoesNotFit"
    # The pool
    NOT_IN_POOL = "AcceleratorNotInPool"
    NODE_TOO_SMALL = "NodeTooSmall"
    NONE_FREE = "AcceleratorsNotFree"
    PENDING_TOO_LONG = "PendingTooLong"


@dataclass(frozen=True, slots=True)
class AcceleratorPreference:
    """One entry of a variant's accelerators, in order of preference.

    Attributes:
        type: the accelerator's name in the catalogue.
        count: accelerators for one replica (CPU: cores); ``None`` lets the planner choose.
    """

    type: str
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What an engine reported at boot, per GPU, with the settings that it ran with.

    Attributes:
        accelerator: where it ran.
        tensor_parallel_size: GPUs that shared each layer.
        weights_gib: weights on each GPU.
        kv_cache_gib: memory left for the KV cache on each GPU.
        kv_cache_tokens: tokens that the KV cache holds.
    """

    accelerator: str
    tensor_parallel_size: int = 1
    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class VariantRequest:
    """One variant to plan.

    Attributes:
        model: facts of its checkpoint, or why there are none. The simulator needs none.
        quantization: as declared: ``None``, ``FP8``, ``AWQ``, ...
        engine: settings as the user wrote them; the plan fills in the rest.
        accelerators: in order of preference; empty means any of the pool, the cheapest first.
        replicas: replicas to hold now. 0 asks whether one could run, and reserves nothing.
        adapters: LoRA adapters that are served beside the model.
        notes: what its user should know however it is planned.
        current: accelerator type that it runs on now: kept as long as the variant still fits there.
        current_percent: share of a GPU that was chosen for what runs now; kept likewise.
        measurements: what engines of this variant reported before, with the same settings.
        min_tokens: KV cache tokens to have at least; default one sequence of the context asked for.
    """

    model: ModelFacts | ModelUnavailable | None
    quantization: str = "None"
    engine: EngineSettings = field(default_factory=lambda: EngineSettings(type="vLLM"))
    accelerators: tuple[AcceleratorPreference, ...] = ()
    replicas: int = 1
    task: Task = Task.GENERATE
    adapters: int = 0
    notes: tuple[str, ...] = ()
    current: str | None = None
    current_percent: int | None = None
    measurements: tuple[Measurement, ...] = ()
    min_tokens: int | None = None

    @property
    def reading(self) -> bool:
        """Whether there is no answer yet, because its checkpoint or its adapters are being read."""
        return self.model is None and self.engine.type != SIMULATOR


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What one node, or each of ``count`` equal ones, has free for replicas.

    Attributes:
        gpus: free share of each accelerator, 0..1. Empty on CPU nodes.
        cpus: free cores; infinite where nobody counts them.
        memory_gib: free host memory; infinite where nobody counts it.
        count: how many such nodes there are.
    """

    gpus: tuple[float, ...] = ()
    cpus: float = float("inf")
    memory_gib: float = float("inf")
    count: int = 1


@dataclass(frozen=True, slots=True)
class AcceleratorGroup:
    """Nodes of one kind, with what is free on them and what may still be added.

    Attributes:
        accelerator: the type's name in the catalogue; each type stands once in a pool.
        nodes: running nodes.
        template: a node that the autoscaler would add, wholly free.
        obtainable_nodes: how many more nodes the autoscaler may add.
        spot: whether nodes can be taken away at short notice.
        relative_cost: cost of one accelerator; default the catalogue's.
        pending_too_long: nodes asked for did not come: plan with those that run.
        ray_resource: custom Ray resource that marks such nodes; ``None`` means Ray's own accelerator type.
    """

    accelerator: str
    nodes: tuple[NodeCapacity, ...] = ()
    template: NodeCapacity | None = None
    obtainable_nodes: int = 0
    spot: bool = False
    relative_cost: float | None = None
    pending_too_long: bool = False
    ray_resource: str | None = None


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a pool has to give: everything that this platform may plan with, less what others hold."""

    groups: tuple[AcceleratorGroup, ...]


class Arithmetic(Protocol):
    """A sum that can be shown; worked out only when somebody asks."""

    def lines(self) -> tuple[str, ...]:
        """The sum for people, one summand a line."""
        ...


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a variant does not run on an accelerator.

    Attributes:
        accelerator: its type; empty where the reason holds everywhere.
        rule: stable word.
        message: the rule or the arithmetic, for people.
        source: where the rule comes from: engine, version, file, or the formula.
        memory: the sum behind it.
        retryable: may pass by itself, such as a hub that can't be reached.
    """

    accelerator: str
    rule: Rule
    message: str
    source: str = ""
    memory: Arithmetic | None = None
    retryable: bool = False

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """The sum, line by line."""
        return self.memory.lines() if self.memory else ()


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """How a variant runs on an accelerator. Sizes are per GPU, as engines report them.

    Attributes:
        accelerator: the catalogue's name.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: groups of GPUs that share the layers among them.
        accelerators_per_replica: GPUs that one replica holds; a fraction for small models; 0 on CPU.
        max_model_len: context length in tokens that is served.
        dtype: of activations and unquantized weights.
        kv_cache_dtype: of the KV cache.
        weight_scheme: how the weights are computed with, such as ``W8A16 (Marlin)``.
        weights_gib: weights on each GPU.
        overhead_gib: activations, CUDA graphs, the CUDA context, and what else the engine needs, per GPU.
        kv_cache_gib: memory left for the KV cache on each GPU.
        kv_cache_tokens: tokens that it holds, over the replica.
        max_sequences: sequences of ``max_model_len`` at once, as the engine counts it.
        largest_context: longest context that one sequence could have here.
        cost: relative cost of one replica.
        cost_rank: 1 is the cheapest of this variant's possible accelerators.
        spot: whether the nodes can be taken away.
        placed_now: replicas that running nodes can take; the others wait for new nodes.
        engine: the request's settings with everything that the plan decides filled in.
        settings: what the plan changed in them, with the reason of each.
        resources: what Ray reserves for one replica.
        measured: whether sizes come from an engine's report; then ``estimate`` holds the calculation.
        memory: the sum behind it.
        notes: what the user should know, such as weight-only FP8.
    """

    accelerator: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    accelerators_per_replica: float
    max_model_len: int | None
    dtype: str
    kv_cache_dtype: str
    weight_scheme: str
    weights_gib: float
    overhead_gib: float
    kv_cache_gib: float
    kv_cache_tokens: int
    max_sequences: float
    largest_context: int
    cost: float
    engine: EngineSettings
    resources: ReplicaResources
    cost_rank: int = 1
    spot: bool = False
    placed_now: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    measured: Measurement | None = None
    estimate: Measurement | None = None
    memory: Arithmetic | None = None
    notes: tuple[str, ...] = ()

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """The sum, line by line."""
        return self.memory.lines() if self.memory else ()


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The planner's answer for one variant.

    Attributes:
        plan: the chosen one; ``None`` where the variant can't run.
        rejections: accelerators that were preferred to the chosen one or possible at all, and why not.
        candidates: ways to run it on the accelerators that were looked at, free or not, the cheapest first.
        reason: ``Planned``, or the rule of the weightiest rejection.
        message: for people.
        short: replicas that find no room beside those that do; the plan is for the others.
    """

    plan: VariantPlan | None
    rejections: tuple[Rejection, ...] = ()
    candidates: tuple[VariantPlan, ...] = ()
    reason: str = "Planned"
    message: str = ""
    short: int = 0

    @property
    def fits(self) -> bool:
        """Whether the variant can run with all its replicas."""
        return self.plan is not None and not self.short

    @property
    def retryable(self) -> bool:
        """Whether the same question may get another answer without a change of the spec."""
        return not self.fits and any(r.retryable for r in self.rejections)
