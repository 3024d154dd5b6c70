"""Plans without arithmetic: the simulator, and checkpoints that can't be looked into from here."""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.planner.capacity import Demand
from modelfleet_operator.planner.facts import ModelUnavailable
from modelfleet_operator.planner.types import (
    AcceleratorGroup,
    AcceleratorPreference,
    VariantPlan,
    VariantRequest,
)
from modelfleet_serving.contract import ReplicaResources

SIMULATOR_CPUS = 0.1
SIMULATED_CONTEXT = 32768
SIMULATED_SEQUENCES = 16
UNSEEN_CPUS = 1.0
SPOT_DISCOUNT = 0.4
"""Cost of a spot node, as a share of the on-demand price; clouds ask between a third and a half."""
MARK = 0.001
"""So little of a custom Ray resource marks the nodes that carry it."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A plan with what one replica takes of the pool."""

    plan: VariantPlan
    demand: Demand


def simulated(
    request: VariantRequest,
    preference: AcceleratorPreference,
    group: AcceleratorGroup,
    known: Accelerator | None,
) -> Sized:
    """The simulator fits anywhere: it holds the accelerators asked for and needs no memory."""
    context = request.engine.max_model_len or SIMULATED_CONTEXT
    note = "simulated: no model is loaded"
    return _told(
        request, preference, group, known, context=context, cpus=SIMULATOR_CPUS, scheme="simulated", note=note
    )


def unseen(
    request: VariantRequest,
    facts: ModelUnavailable,
    preference: AcceleratorPreference,
    group: AcceleratorGroup,
    known: Accelerator,
) -> Sized:
    """A checkpoint that can't be looked into from here runs as its user asks, at the user's risk."""
    note = f"not checked: {facts.message}"
    return _told(
        request, preference, group, known, context=request.engine.max_model_len, cpus=UNSEEN_CPUS,
        scheme="unknown", note=note,
    )  # fmt: skip


def _told(
    request: VariantRequest,
    preference: AcceleratorPreference,
    group: AcceleratorGroup,
    known: Accelerator | None,
    *,
    context: int | None,
    cpus: float,
    scheme: str,
    note: str,
) -> Sized:
    on_cpu = known is not None and known.is_cpu
    stages = request.engine.pipeline_parallel_size
    gpus = 0.0 if on_cpu else float(preference.count or request.engine.tensor_parallel_size * stages)
    if on_cpu and preference.count:
        cpus = float(preference.count) if scheme == "unknown" else cpus
    held = context if scheme == "simulated" and context else 0
    plan = VariantPlan(
        accelerator=group.accelerator,
        tensor_parallel_size=request.engine.tensor_parallel_size,
        pipeline_parallel_size=stages,
        accelerators_per_replica=gpus,
        max_model_len=context,
        dtype=request.engine.dtype or "auto",
        kv_cache_dtype=request.engine.kv_cache_dtype or "auto",
        weight_scheme=scheme,
        weights_gib=0.0,
        overhead_gib=0.0,
        kv_cache_gib=0.0,
        kv_cache_tokens=held * SIMULATED_SEQUENCES,
        max_sequences=float(SIMULATED_SEQUENCES if held else 0),
        largest_context=held,
        cost=cost_of(group, known, gpus),
        engine=request.engine,
        resources=resources_of(group, known, cpus, gpus),
        spot=group.spot,
        notes=(note, *request.notes),
    )
    return Sized(plan, Demand(gpus / stages, cpus, 0.0, stages))


def cost_of(group: AcceleratorGroup, known: Accelerator | None, gpus: float) -> float:
    """Relative cost of one replica."""
    each = group.relative_cost
    if each is None:
        each = (known.relative_cost if known else 1.0) * (SPOT_DISCOUNT if group.spot else 1.0)
    return round(each * (gpus or 1.0), 3)


def resources_of(
    group: AcceleratorGroup, known: Accelerator | None, cpus: float, gpus: float
) -> ReplicaResources:
    """What Ray reserves for one replica."""
    marks = {group.ray_resource: MARK} if group.ray_resource else {}
    if known is not None and known.is_cpu:
        return ReplicaResources(num_cpus=cpus, resources=marks)
    kind = None if marks or known is None else known.ray_type
    return ReplicaResources(num_cpus=cpus, num_gpus=gpus, accelerator_type=kind, resources=marks)
