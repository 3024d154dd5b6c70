"""The user's resource: one model with one or more variants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from modelfleet_operator.api.base import (
    HELD_BY_SCHEMA,
    ApiModel,
    Duration,
    Name,
    Rule,
)
from modelfleet_operator.api.engine import EngineSpec
from modelfleet_operator.api.resource import Resource
from modelfleet_operator.api.status import ModelDeploymentStatus

Quantization = Literal[
    "None", "FP8", "INT8", "AWQ", "GPTQ", "CompressedTensors", "BitsAndBytes", "GGUF", "MXFP4", "NVFP4"
]
TaskType = Literal["Generate", "Embed", "Rerank", "Score", "Classify", "Transcribe"]
Source = Annotated[
    str, StringConstraints(pattern=r"^(hf|pvc|s3|gs|oci|file)://[^\s]+$", min_length=6, max_length=1024)
]
ModelName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$", min_length=1, max_length=128),
]
AcceleratorType = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class ModelSpec(ApiModel):
    """The model: its name for clients and its weights."""

    name: ModelName | None = None
    """OpenAI model id that clients ask for. Default: the resource's name. Can't be changed."""
    source: Source | None = None
    """Where the weights are: hf://org/name[@revision], pvc://claim/path, s3://, gs://, oci://, file:///path."""
    task: TaskType = "Generate"
    """What the model does."""

    rules = (
        Rule(
            cel="has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)",
            message="model.name can't be changed: clients ask for it; make a new ModelDeployment",
            check=None,
            field="name",
        ),
    )


class AcceleratorChoice(ApiModel):
    """An accelerator that may run the variant."""

    type: AcceleratorType
    """Type, as the pool names it: A10, T4, A100-80G, CPU."""
    count: Annotated[int, Field(ge=1, le=64)] | None = None
    """Accelerators for one replica. Default: the fewest that hold the model."""


class ReplicaBounds(ApiModel):
    """How many replicas a variant has."""

    min: Annotated[int, Field(ge=0, le=1000)] = 1
    """Replicas that always run. 0 lets the variant scale to zero."""
    max: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Replicas at the most. Default: min, at least 1."""

    rules = (
        Rule(
            cel="!has(self.max) || self.min <= self.max",
            message="replicas.min must not exceed replicas.max",
            check=lambda self: self.max is None or self.min <= self.max,
            field="min",
        ),
    )

    @property
    def upper(self) -> int:
        """Replicas at the most, with the default worked out."""
        return self.max if self.max is not None else max(self.min, 1)


class Variant(ApiModel):
    """One way to run the model: weights, quantization, engine, accelerators, replicas."""

    name: Name
    """Name; clients may ask for MODEL:NAME."""
    source: Source | None = None
    """Weights of this variant. Default: `spec.model.source`."""
    quantization: Quantization = "None"
    """How the weights are quantized. Checked against the checkpoint."""
    engine: EngineSpec | None = None
    """Overrides of `spec.engine`, field by field."""
    accelerators: Annotated[list[AcceleratorChoice], Field(max_length=16)] = []
    """Accelerators in order of preference. Default: any of the pool, the cheapest first."""
    replicas: ReplicaBounds = ReplicaBounds()
    """How many replicas there are."""


class QueueSpec(ApiModel):
    """What happens to requests that nothing can take at once."""

    max_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    """Requests that wait; one more is answered 429."""
    timeout: Duration = "300s"
    """Longest wait; then 504."""


class Routing(ApiModel):
    """Which variant and replica a request goes to."""

    weights: Annotated[dict[str, Annotated[int, Field(ge=0, le=1_000_000)]], Field(max_length=16)] | None = (
        None
    )
    """Share of each variant in requests for the bare model name. Default: all variants alike."""
    fallback: Annotated[list[Name], Field(max_length=16)] = []
    """Variants to try, in this order, when the chosen one can't serve."""
    affinity: Literal["Prefix", "Session", "None"] = "Prefix"
    """What keeps requests on one replica: a common prefix, the session header, or nothing."""
    queue: QueueSpec = QueueSpec()
    """The holding queue."""

    rules = (
        Rule(
            cel="!has(self.weights) || self.weights.exists(v, self.weights[v] > 0)",
            message="routing.weights must give at least one variant a weight above 0",
            check=lambda self: self.weights is None or any(w > 0 for w in self.weights.values()),
            field="weights",
        ),
        Rule(
            cel="!has(self.fallback) || self.fallback.all(v, self.fallback.exists_one(w, w == v))",
            message="routing.fallback must name each variant once",
            check=lambda self: len(set(self.fallback)) == len(self.fallback),
            field="fallback",
        ),
    )


class Rollout(ApiModel):
    """How a changed engine takes the place of the running one."""

    strategy: Literal["Auto", "Surge", "Recreate"] = "Auto"
    """Surge starts the new revision beside the old one, Recreate after it; Auto surges where it fits."""
    drain_timeout: Duration = "600s"
    """Longest time that running requests of the old revision are given."""


class AdapterSpec(ApiModel):
    """A LoRA adapter, served under its own model name beside every variant of the base model."""

    name: ModelName
    """OpenAI model id of the adapter."""
    source: Source
    """Where the adapter's weights are."""


class ModelDeploymentSpec(ApiModel):
    """What the user wants."""

    model: ModelSpec
    """The model."""
    pool: Name = "default"
    """ServingPool that runs it."""
    suspend: bool = False
    """Whether it pauses: its replicas drain and end, its name and plan are kept, requests are refused."""
    engine: EngineSpec | None = None
    """Engine settings that all variants share."""
    variants: Annotated[
        list[Variant], Field(min_length=1, max_length=16, json_schema_extra={"x-map-key": "name"})
    ]
    """Ways to run the model."""
    adapters: Annotated[list[AdapterSpec], Field(max_length=64, json_schema_extra={"x-map-key": "name"})] = []
    """LoRA adapters."""
    routing: Routing = Routing()
    """Which variant and replica a request goes to."""
    rollout: Rollout = Rollout()
    """How changes are rolled out."""

    rules = (
        Rule(
            cel="has(self.model.source) || self.variants.all(v, has(v.source))",
            message="model.source is needed unless every variant has a source of its own",
            check=lambda self: bool(self.model.source) or all(v.source for v in self.variants),
            field="model.source",
        ),
        Rule(
            cel=(
                "!has(self.routing) || !has(self.routing.weights)"
                " || self.routing.weights.all(w, self.variants.exists(v, v.name == w))"
            ),
            message="routing.weights must name variants of this deployment",
            check=lambda self: (self.routing.weights or {}).keys() <= {v.name for v in self.variants},
            field="routing.weights",
        ),
        Rule(
            cel=(
                "!has(self.routing) || !has(self.routing.fallback)"
                " || self.routing.fallback.all(f, self.variants.exists(v, v.name == f))"
            ),
            message="routing.fallback must name variants of this deployment",
            check=lambda self: set(self.routing.fallback) <= {v.name for v in self.variants},
            field="routing.fallback",
        ),
        Rule(
            cel=(
                "!has(self.adapters) || !has(self.model.name)"
                " || self.adapters.all(a, a.name != self.model.name)"
            ),
            message="an adapter must not have the name of its model",
            check=lambda self: all(a.name != self.model.name for a in self.adapters),
            field="adapters",
        ),
        Rule(
            cel=HELD_BY_SCHEMA,
            message="each variant needs a name of its own",
            check=lambda self: len({v.name for v in self.variants}) == len(self.variants),
            field="variants",
        ),
        Rule(
            cel=HELD_BY_SCHEMA,
            message="each adapter needs a name of its own",
            check=lambda self: len({a.name for a in self.adapters}) == len(self.adapters),
            field="adapters",
        ),
    )


class ModelDeployment(Resource):
    """One model with one or more quantization variants, each on the accelerators that fit it."""

    kind: Literal["ModelDeployment"] = "ModelDeployment"
    """Kind of the resource."""
    spec: ModelDeploymentSpec
    """What the user wants."""
    status: ModelDeploymentStatus | None = None
    """Observed state; written by the operator."""

    rules = (
        *Resource.rules,
        Rule(
            cel=(
                "has(self.spec.model.name) || !has(self.spec.adapters)"
                " || self.spec.adapters.all(a, a.name != self.metadata.name)"
            ),
            message="an adapter must not have the name of its model, here the resource's",
            check=lambda self: (
                self.spec.model.name is not None
                or all(a.name != self.metadata.name for a in self.spec.adapters)
            ),
            field="spec.adapters",
        ),
    )

    @property
    def model_name(self) -> str:
        """The OpenAI model id."""
        return self.spec.model.name or self.metadata.name

    def source(self, variant: Variant) -> str:
        """Where a variant's weights are."""
        source = variant.source or self.spec.model.source
        if source is None:  # the schema's rule holds; a constructed object may not
            raise ValueError(f"variant {variant.name} of {self.key} has no source")
        return source

    def engine(self, variant: Variant) -> EngineSpec:
        """A variant's engine with the deployment's settings under it."""
        engine = (variant.engine or EngineSpec()).over(self.spec.engine)
        return engine if engine.type else engine.model_copy(update={"type": "vLLM"})

    def needs_facts(self, variant: Variant) -> bool:
        """Whether the plan depends on the checkpoint; the simulator reads none."""
        chosen = (engine.type for engine in (variant.engine, self.spec.engine) if engine and engine.type)
        return next(chosen, "") != "Simulator"

    def weight(self, variant: Variant) -> int:
        """Weight of a variant for the bare model name; all alike where none are given."""
        weights: dict[str, Any] | None = self.spec.routing.weights
        return 1 if weights is None else int(weights.get(variant.name, 0))
