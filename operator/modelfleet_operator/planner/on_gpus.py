"""Sizing on GPUs: the smallest parallel sizes that hold a variant, by estimate or as it was measured."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import msgspec.structs

from modelfleet_operator.planner.capacity import Demand, node_count, node_shape
from modelfleet_operator.planner.fit import Fit
from modelfleet_operator.planner.memory import Footprint
from modelfleet_operator.planner.parallel import splits, tensor_parallel_problem
from modelfleet_operator.planner.types import GIB, Measurement, Rejection, Rule
from modelfleet_operator.planner.unseen import Sized
from modelfleet_operator.planner.weights import weights_per_rank
from modelfleet_serving.contract import EngineSettings

REPLICA_CPUS = 1.0
FRACTION_STEP = 5
"""Percent: shares of a GPU are rounded up to it."""
LARGEST_FRACTION = 90
"""Percent: a larger share takes the whole GPU."""
SMALL_FRACTION = 50
"""Percent: a share that the planner chooses leaves room for another one of its size."""
CUDA_CONTEXT_GIB = 0.7
"""Memory of a process on the GPU outside the engine's own accounting: 0.63 to 0.68 GiB on an H100."""
ENCODER_MARGIN = 1.15
"""Over what an encoder needs by the estimate."""


def rounded_percent(need_gib: float, memory_gib: float) -> int:
    """The share of a GPU that holds so much, in percent."""
    return ceil(100 * need_gib / memory_gib / FRACTION_STEP) * FRACTION_STEP


def size_on_gpus(fit: Fit) -> Sized | Rejection:
    """The first split over GPUs that fits, of those that the user and the nodes leave; or why none does."""
    engine = fit.request.engine
    per_node = len(node_shape(fit.group).gpus)
    if fit.accelerator.slice:
        per_node = min(per_node, 1)
    weights = weights_per_rank(fit.facts, fit.verdict.scheme, _split(fit, 1, 1), fit.dtype_bytes)
    last: Rejection | None = None
    hopeless: tuple[int, int] | None = None
    for tensor, pipeline in splits(
        fit.facts,
        tensor_parallel=engine.tensor_parallel_size if engine.tensor_parallel_size > 1 else None,
        pipeline_parallel=engine.pipeline_parallel_size if engine.pipeline_parallel_size > 1 else None,
        count=fit.preference.count,
        gpus_per_node=per_node,
        nodes=node_count(fit.group),
    ):
        if pipeline > 1 and not fit.verdict.splits_layers:
            continue
        if (problem := _tensor_problem(fit, tensor, per_node)) is not None:
            return fit.refuse(Rule.TENSOR_PARALLEL, problem)
        if weights / (tensor * pipeline) > fit.accelerator.memory_gib * GIB:
            hopeless, last = (tensor, pipeline), None  # no split makes a rank smaller than its share
            continue
        outcome = _size(fit, tensor, pipeline)
        if isinstance(outcome, Sized):
            return outcome
        last = outcome
    if last is None and hopeless is not None:
        return _size(fit, *hopeless)
    return last or fit.refuse(Rule.TENSOR_PARALLEL, _no_split(fit, per_node))


def _split(fit: Fit, tensor: int, pipeline: int) -> EngineSettings:
    return msgspec.structs.replace(
        fit.request.engine, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline
    )


def _tensor_problem(fit: Fit, tensor: int, per_node: int) -> str | None:
    problem = tensor_parallel_problem(fit.facts, tensor)
    if problem is None and tensor > per_node:
        return f"{tensor} GPUs of one node are needed, {fit.accelerator.name} nodes have {per_node}"
    return problem


def _no_split(fit: Fit, per_node: int) -> str:
    if not per_node:
        return f"nodes with {fit.accelerator.name} have no GPU"
    return (
        f"{fit.preference.count} GPUs can't share {fit.facts.heads} attention heads and "
        f"{fit.facts.kv_heads} KV heads, with {per_node} on a node"
    )


def _size(fit: Fit, tensor: int, pipeline: int) -> Sized | Rejection:
    settings = _split(fit, tensor, pipeline)
    estimate = fit.footprint(settings, fit.accelerator.memory_gib)
    applied = {}
    if (percent := _encoder_percent(fit, settings, estimate)) is not None:
        settings = msgspec.structs.replace(settings, gpu_memory_percent=percent)
        estimate = fit.footprint(settings, fit.accelerator.memory_gib)
        applied["gpuMemoryPercent"] = "the share that the model needs"
    measured = _measurement(fit, settings)
    foot = _measured_footprint(estimate, measured)
    fits = foot.layout.largest_context(foot.kv_cache, fit.context)
    if (problem := fit.memory_problem(foot, fits)) is not None:
        return problem
    demand = Demand(_gpus(fit, settings, estimate), REPLICA_CPUS, 0.0, pipeline)
    sized = fit.plan(settings, foot, min(fit.context, fits), demand, applied)
    if measured is None:
        return sized
    before = Measurement(
        fit.accelerator.name,
        tensor,
        estimate.weights / GIB,
        max(estimate.kv_cache, 0.0) / GIB,
        estimate.layout.tokens(estimate.kv_cache, sized.plan.max_model_len or fit.context),
    )
    return replace(sized, plan=replace(sized.plan, measured=measured, estimate=before))


def _gpus(fit: Fit, settings: EngineSettings, foot: Footprint) -> float:
    """GPUs of one pipeline stage: whole ones, or the share that the user or the planner set.

    A process takes more than its share: its CUDA context, and what its engine does not count.
    """
    percent = settings.gpu_memory_percent
    alone = settings.tensor_parallel_size * settings.pipeline_parallel_size == 1
    if percent is not None and percent <= LARGEST_FRACTION and alone:
        beside = CUDA_CONTEXT_GIB + foot.overhead.unreserved / GIB
        share = percent / 100 + beside / fit.accelerator.memory_gib
        if fit.preference.count is None and share < 1 and not fit.defaults.static_share:
            return ceil(share * 100) / 100
    return float(settings.tensor_parallel_size)


def _encoder_percent(fit: Fit, settings: EngineSettings, foot: Footprint) -> int | None:
    """Models without a KV cache get the share that they need: more memory would buy nothing."""
    fixed = settings.gpu_memory_percent is not None or fit.preference.count is not None
    split = settings.tensor_parallel_size * settings.pipeline_parallel_size > 1
    if not foot.layout.empty or fixed or split or fit.defaults.static_share:
        return None
    need = ENCODER_MARGIN * (foot.weights + foot.overhead.total + foot.overhead.unreserved) / GIB
    percent = rounded_percent(need, fit.accelerator.memory_gib)
    return percent if percent <= SMALL_FRACTION else None


def _measurement(fit: Fit, settings: EngineSettings) -> Measurement | None:
    """What an engine like this one reported; not one with a whole GPU where this takes a share."""
    room = fit.accelerator.memory_gib * (settings.gpu_memory_percent or 100) / 100
    tensor = settings.tensor_parallel_size
    return next(
        (
            m
            for m in fit.request.measurements
            if m.accelerator == fit.accelerator.name
            and m.tensor_parallel_size == tensor
            and m.kv_cache_gib is not None
            and m.kv_cache_gib <= room
        ),
        None,
    )


def _measured_footprint(foot: Footprint, measured: Measurement | None) -> Footprint:
    if measured is None or measured.kv_cache_gib is None:
        return foot
    weights = foot.weights if measured.weights_gib is None else measured.weights_gib * GIB
    return replace(foot, weights=weights, kv_cache=measured.kv_cache_gib * GIB)
