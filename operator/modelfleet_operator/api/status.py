"""Status types. Every field that the operator writes is here, so that it stands in the schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from modelfleet_operator.api.base import ApiModel

Text = Annotated[str, StringConstraints(max_length=32768)]
Decimal = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?$", max_length=24)]


class StatusModel(ApiModel):
    """Base of all status types. What a newer release has written is let through unseen after a rollback."""

    model_config = ConfigDict(**{**ApiModel.model_config, "extra": "ignore"})


class Condition(StatusModel):
    """One aspect of the resource's state."""

    type: Annotated[str, StringConstraints(max_length=64)]
    """Name of the aspect."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: int | None = None
    """Generation of the spec that this was found for."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When `status` last changed."""
    reason: Annotated[str, StringConstraints(max_length=128)]
    """Why, in one CamelCase word that does not change between releases."""
    message: Text = ""
    """Why, for people."""


class PlanStatus(StatusModel):
    """What the planner worked out for a variant. Sizes are per GPU, in GiB."""

    weights_gi_b: Decimal | None = None
    """Weights on each GPU."""
    kv_cache_gi_b: Decimal | None = None
    """Room for the KV cache on each GPU."""
    kv_cache_tokens: int | None = None
    """Tokens that the KV cache holds."""
    max_model_len: int | None = None
    """Context length that is served."""
    measured: bool | None = None
    """Whether the sizes are what the engine reported; otherwise they are calculated."""
    notes: Annotated[list[Text], Field(max_length=96)] | None = None
    """What to know of the plan, such as adapters whose rank can't be read."""


class RejectionStatus(StatusModel):
    """Why a variant does not run on an accelerator."""

    accelerator: str
    """Type of the accelerator."""
    reason: str
    """Why, in one CamelCase word."""
    message: Text = ""
    """The arithmetic or the rule."""


class MeasurementStatus(StatusModel):
    """What an engine reported at boot, kept for the next plan."""

    accelerator: str
    """Type of the accelerator."""
    revision: str
    """Revision that was measured."""
    tensor_parallel: int = 1
    """GPUs that shared each layer."""
    weights_gi_b: Decimal | None = None
    """Weights on each GPU."""
    kv_cache_gi_b: Decimal | None = None
    """Room for the KV cache on each GPU."""
    kv_cache_tokens: int | None = None
    """Tokens that the KV cache holds."""


class VariantStatus(StatusModel):
    """State of one variant."""

    name: str
    """Name of the variant."""
    revision: str | None = None
    """Hash of everything that changes a running engine."""
    accelerator: str | None = None
    """Accelerator that the plan chose."""
    tensor_parallel: int | None = None
    """GPUs that share each layer."""
    pipeline_parallel: int | None = None
    """Groups of GPUs that share the layers."""
    replicas: int = 0
    """Replicas that are wanted."""
    ready_replicas: int = 0
    """Replicas that answer requests."""
    weight: int = 0
    """Share of the requests for the bare model name."""
    reason: str = ""
    """State in one CamelCase word."""
    message: Text = ""
    """State for people: the arithmetic, the rule, or the last lines of the engine's log."""
    plan: PlanStatus | None = None
    """Memory that the plan reckons with."""
    rejections: Annotated[list[RejectionStatus], Field(max_length=32)] | None = None
    """Accelerators that can't run the variant, and why."""
    measurements: Annotated[list[MeasurementStatus], Field(max_length=16)] | None = None
    """What the variant's engines reported, by accelerator."""


class ModelDeploymentStatus(StatusModel):
    """Observed state; written by the operator."""

    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra={"x-map-key": "type"})] = []
    """Accepted, Fits, Progressing, Serving, Suspended, Ready."""
    observed_generation: int | None = None
    """Generation of the spec that the status is about."""
    model: str | None = None
    """OpenAI model id."""
    pool: str | None = None
    """ServingPool that serves it, as namespace/name; during a move the one before."""
    ready: str | None = None
    """Variants that are ready, of all: 1/2."""
    variant_names: str | None = None
    """Names of the variants, for the table."""
    replicas: int | None = None
    """Replicas that are wanted, over all variants."""
    ready_replicas: int | None = None
    """Replicas that answer requests, over all variants."""
    variants: Annotated[
        list[VariantStatus], Field(max_length=32, json_schema_extra={"x-map-key": "name"})
    ] = []
    """State of each variant."""


class AcceleratorStatus(StatusModel):
    """What a pool has of one accelerator type."""

    type: str
    """Type of the accelerator."""
    total: int = 0
    """Accelerators of running nodes."""
    used: int = 0
    """Accelerators that replicas hold."""
    free: int = 0
    """Accelerators of running nodes that no replica holds."""
    obtainable: int = 0
    """Accelerators that the autoscaler may still add."""


class ServingPoolStatus(StatusModel):
    """Observed state; written by the operator."""

    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra={"x-map-key": "type"})] = []
    """Accepted, ClusterReady, RegistryReady, Ready."""
    observed_generation: int | None = None
    """Generation of the spec that the status is about."""
    address: str | None = None
    """Ray dashboard that the operator speaks with."""
    registry: str | None = None
    """Registry of the pool."""
    ready: str | None = None
    """Whether the pool can run models, for the table."""
    accelerators: Annotated[list[AcceleratorStatus], Field(max_length=64)] = []
    """What there is, by accelerator."""
    free: str | None = None
    """Free accelerators, for the table: A10 3/8, T4 0/4."""
    used_by: Annotated[list[str], Field(max_length=4096)] = []
    """ModelDeployments that run here, as namespace/name."""
