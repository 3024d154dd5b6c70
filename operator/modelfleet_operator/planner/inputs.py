"""From API resources to the planner's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from modelfleet_operator.api.base import quantity_value
from modelfleet_operator.api.model_deployment import ModelDeployment, Variant
from modelfleet_operator.api.serving_pool import AcceleratorGroup as PoolGroup
from modelfleet_operator.api.serving_pool import ServingPool
from modelfleet_operator.planner.adapters import AdapterFacts, RankChoice, adapter_key, choose_rank
from modelfleet_operator.planner.facts import ModelFacts, ModelUnavailable
from modelfleet_operator.planner.types import (
    AcceleratorGroup,
    AcceleratorPreference,
    Measurement,
    NodeCapacity,
    PoolView,
    VariantRequest,
)
from modelfleet_serving.contract import Adapter, Task

Facts = Mapping[str, ModelFacts | AdapterFacts | ModelUnavailable]
"""Of models by their source, of adapters by :func:`adapter_key`; what is not read yet is missing."""


def sources_of(deployment: ModelDeployment) -> set[str]:
    """Keys of the facts that the plans of a ModelDeployment depend on."""
    planned = [v for v in deployment.spec.variants if deployment.needs_facts(v)]
    models = {deployment.source(v) for v in planned}
    return models | {adapter_key(a.source) for a in deployment.spec.adapters if planned}


def variant_request(
    deployment: ModelDeployment,
    variant: Variant,
    facts: Facts,
    *,
    replicas: int | None = None,
    current: str | None = None,
    current_percent: int | None = None,
    lora_rank: int | None = None,
) -> VariantRequest:
    """The request of one variant.

    Args:
        deployment: the resource.
        variant: one of its variants.
        facts: what is known of checkpoints and adapters.
        replicas: to hold now; default the variant's minimum.
        current: accelerator that it runs on.
        current_percent: share of it that the running engines take, in percent.
        lora_rank: that it runs with.
    """
    spec = deployment.spec
    engine = deployment.engine(variant).settings(adapters=bool(spec.adapters))
    found = facts.get(deployment.source(variant)) if deployment.needs_facts(variant) else None
    model = None if isinstance(found, AdapterFacts) else found
    notes: tuple[str, ...] = ()
    if engine.lora is not None and deployment.needs_facts(variant):
        choice = _rank(deployment, variant, facts, lora_rank)
        engine = msgspec.structs.replace(
            engine, lora=msgspec.structs.replace(engine.lora, max_rank=choice.rank)
        )
        notes = choice.notes
        if choice.unread and lora_rank is None:
            model = None  # an engine that is started before they are known might have to be started again
    return VariantRequest(
        model=model,
        quantization=variant.quantization,
        engine=engine,
        accelerators=tuple(AcceleratorPreference(a.type, a.count) for a in variant.accelerators),
        replicas=variant.replicas.min if replicas is None else replicas,
        task=Task(spec.model.task),
        adapters=len(spec.adapters),
        notes=notes,
        current=current,
        current_percent=current_percent if engine.gpu_memory_percent is None else None,
        measurements=_measurements(deployment, variant.name),
    )


def _rank(deployment: ModelDeployment, variant: Variant, facts: Facts, running: int | None) -> RankChoice:
    lora = deployment.engine(variant).lora
    adapters = [Adapter(name=a.name, source=a.source) for a in deployment.spec.adapters]
    return choose_rank(adapters, facts, asked=lora.max_rank if lora else None, running=running)


def _measurements(deployment: ModelDeployment, variant: str) -> tuple[Measurement, ...]:
    status = deployment.status
    row = next((v for v in status.variants if v.name == variant), None) if status else None
    return tuple(
        Measurement(
            accelerator=m.accelerator,
            tensor_parallel_size=m.tensor_parallel,
            weights_gib=float(m.weights_gi_b) if m.weights_gi_b else None,
            kv_cache_gib=float(m.kv_cache_gi_b) if m.kv_cache_gi_b else None,
            kv_cache_tokens=m.kv_cache_tokens,
        )
        for m in (row.measurements if row and row.measurements else ())
    )


def pool_view(pool: ServingPool) -> PoolView:
    """A pool as declared: every node that may be, none of it in use.

    For `modelfleet plan`. The operator plans with what it observes instead.
    """
    return PoolView(
        tuple(_group(group, managed=pool.spec.ray.cluster is not None) for group in pool.spec.accelerators)
    )


def _group(group: PoolGroup, *, managed: bool) -> AcceleratorGroup:
    node = node_template(group)
    return AcceleratorGroup(
        accelerator=group.type,
        nodes=(NodeCapacity(node.gpus, node.cpus, node.memory_gib, group.min_nodes),)
        if group.min_nodes
        else (),
        template=node,
        obtainable_nodes=group.max_nodes - group.min_nodes,
        spot=group.spot,
        ray_resource=ray_resource(group.type) if managed else None,
    )


def node_template(group: PoolGroup) -> NodeCapacity:
    """A wholly free node of a group as the pool declares it."""
    return NodeCapacity(
        gpus=() if group.type == "CPU" else (1.0,) * group.gpus_per_node,
        cpus=quantity_value(group.cpus_per_node) if group.cpus_per_node else float("inf"),
        memory_gib=quantity_value(group.memory_per_node) / 2**30 if group.memory_per_node else float("inf"),
    )


def ray_resource(accelerator: str) -> str:
    """Custom Ray resource that marks nodes with this accelerator in clusters that the operator makes."""
    return f"accelerator:{accelerator}"
