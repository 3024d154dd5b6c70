"""Sizing one variant on one accelerator: legality, memory, parallel sizes, context; not what is free."""

from __future__ import annotations

from dataclasses import replace

import msgspec.structs

from modelfleet_operator.catalog.accelerators import Accelerator, accelerator
from modelfleet_operator.catalog.engines import engine_defaults, oldest_version, version_key
from modelfleet_operator.catalog.reserved import reserved_settings
from modelfleet_operator.planner.facts import ModelUnavailable
from modelfleet_operator.planner.fit import Fit
from modelfleet_operator.planner.legality import judge
from modelfleet_operator.planner.on_cpu import size_on_cpu
from modelfleet_operator.planner.on_gpus import (
    FRACTION_STEP,
    SMALL_FRACTION,
    rounded_percent,
    size_on_gpus,
)
from modelfleet_operator.planner.types import (
    SIMULATOR,
    AcceleratorGroup,
    AcceleratorPreference,
    Rejection,
    Rule,
    VariantPlan,
    VariantRequest,
)
from modelfleet_operator.planner.unseen import Sized, simulated, unseen
from modelfleet_serving.contract import EngineSettings

PACKED_SEQUENCES = 4
"""Sequences of the full context that a share of a GPU must hold, where the planner chooses it."""


def size_variant(
    request: VariantRequest, preference: AcceleratorPreference, group: AcceleratorGroup
) -> Sized | Rejection:
    """The smallest way to run a variant on a group's nodes, or why there is none."""
    known = accelerator(group.accelerator)
    if request.engine.type == SIMULATOR:
        return simulated(request, preference, group, known)
    if known is None:
        return Rejection(
            group.accelerator,
            Rule.ACCELERATOR_UNKNOWN,
            f"{group.accelerator} is not in the catalogue of accelerators",
        )
    defaults = engine_defaults(request.engine.type, request.engine.version)
    if defaults is None:
        return Rejection(known.name, Rule.ENGINE_NOT_SUPPORTED, f"{request.engine.type} is no known engine")
    if (problem := _engine_problem(request.engine, known)) is not None:
        return problem
    facts = request.model
    if facts is None:
        return Rejection(known.name, Rule.READING_MODEL, "the checkpoint is being read", retryable=True)
    if isinstance(facts, ModelUnavailable):
        if facts.unseen:
            return unseen(request, facts, preference, group, known)
        text = f"{facts.reason}: {facts.message}"
        return Rejection(known.name, Rule.MODEL_UNAVAILABLE, text, retryable=facts.retryable)
    verdict = judge(request, facts, known)
    if isinstance(verdict, Rejection):
        return verdict
    fit = Fit(request, preference, group, known, defaults, facts, verdict)
    return size_on_cpu(fit) if known.is_cpu else size_on_gpus(fit)


def _engine_problem(engine: EngineSettings, known: Accelerator) -> Rejection | None:
    """What is wrong with the engine's settings wherever it runs, and whatever the checkpoint is."""
    oldest = oldest_version(engine.type)
    if engine.version and oldest and version_key(engine.version) < version_key(oldest):
        text = f"{engine.type} {engine.version} is older than {oldest}, the oldest that is known here"
        return Rejection(known.name, Rule.ENGINE_NOT_SUPPORTED, text, "catalogue")
    if taken := "; ".join(reserved_settings(engine.type, engine.args, engine.env)):
        return Rejection(known.name, Rule.ENGINE_SETTINGS, taken, "the engine's adapter")
    return None


def pack_variant(
    request: VariantRequest, preference: AcceleratorPreference, group: AcceleratorGroup, whole: VariantPlan
) -> Sized | None:
    """The variant on a share of a GPU, where half of one is enough; for when no whole one is free.

    One that runs on a share keeps it while what it needs is not a step apart.
    """
    known = accelerator(group.accelerator)
    engine = request.engine
    fixed = engine.gpu_memory_percent is not None or engine.kv_cache_memory_bytes is not None
    if (
        known is None
        or known.is_cpu
        or fixed
        or preference.count is not None
        or whole.tensor_parallel_size > 1
    ):
        return None
    if not whole.kv_cache_tokens or whole.accelerators_per_replica != 1 or engine.type == SIMULATOR:
        return None
    per_token = whole.kv_cache_gib / whole.kv_cache_tokens
    need = whole.weights_gib + whole.overhead_gib + PACKED_SEQUENCES * (whole.max_model_len or 0) * per_token
    percent = rounded_percent(need, known.memory_gib)
    running = request.current_percent if request.current == group.accelerator else None
    close = running is not None and abs(percent - running) <= FRACTION_STEP
    for share in dict.fromkeys((running if close and running else percent, percent)):
        if share <= SMALL_FRACTION:
            packed = replace(request, engine=msgspec.structs.replace(engine, gpu_memory_percent=share))
            if isinstance(sized := size_variant(packed, preference, group), Sized):
                return sized
    return None
