"""Sizing on a CPU: weights and KV cache in host memory, where the cache is given a size of its own."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, isinf

import msgspec.structs

from modelfleet_operator.planner.capacity import Demand, node_shape
from modelfleet_operator.planner.fit import DEFAULT_LEAST_CONTEXT, Fit
from modelfleet_operator.planner.memory import Footprint
from modelfleet_operator.planner.types import GIB, Rejection, Rule
from modelfleet_operator.planner.unseen import Sized

REPLICA_CPUS = 0.5
"""Ray's share for a replica where the user names no cores: the engine takes what is idle."""
KV_SEQUENCES = 8
KV_MOST_GIB = 8
UNCOUNTED_MEMORY_GIB = 1024.0
"""Host memory of nodes whose memory nobody counts."""


def size_on_cpu(fit: Fit) -> Sized | Rejection:
    """One process in a node's memory, or why it has no room there."""
    engine = fit.request.engine
    if engine.tensor_parallel_size * engine.pipeline_parallel_size > 1:
        return fit.refuse(Rule.TENSOR_PARALLEL, "on a CPU one replica is one process: no parallel sizes")
    node = node_shape(fit.group)
    memory = UNCOUNTED_MEMORY_GIB if isinf(node.memory_gib) else node.memory_gib
    asked = engine.kv_cache_memory_bytes
    foot = fit.footprint(msgspec.structs.replace(engine, kv_cache_memory_bytes=asked or GIB), memory)
    fixed = foot.weights + foot.overhead.total
    kv_cache = asked if asked is not None else _kv_cache(fit, foot, memory * GIB - fixed)
    foot = replace(foot, kv_cache=float(kv_cache), memory=fixed + kv_cache, share=1.0)
    if fixed + kv_cache > memory * GIB or not kv_cache:
        text = (
            f"weights {foot.weights / GIB:.1f} GiB, runtime {foot.overhead.total / GIB:.1f} GiB and "
            f"{max(kv_cache, GIB) / GIB:.1f} GiB of KV cache exceed the {memory:.1f} GiB of a CPU node"
        )
        return fit.refuse(Rule.WEIGHTS_DO_NOT_FIT, text, foot)
    fits = foot.layout.largest_context(kv_cache, fit.context)
    if (problem := fit.memory_problem(foot, fits)) is not None:
        return problem
    need = (fixed + kv_cache) / GIB
    percent = min(max(ceil(100 * need / memory), 1), 100)
    settings = msgspec.structs.replace(engine, kv_cache_memory_bytes=kv_cache, gpu_memory_percent=percent)
    applied = {}
    if percent != engine.gpu_memory_percent:
        applied["gpuMemoryPercent"] = "the share that the model needs"
    if kv_cache != asked:
        applied["kvCacheMemory"] = f"room for {KV_SEQUENCES} sequences, where the node has it"
    cores = float(fit.preference.count or min(REPLICA_CPUS, node.cpus))
    return fit.plan(settings, foot, min(fit.context, fits), Demand(0.0, cores, need), applied)


def _kv_cache(fit: Fit, foot: Footprint, room: float) -> int:
    """Bytes: whole GiB for some sequences of the context, within what the node has."""
    wanted = foot.layout.request_bytes(fit.context) * KV_SEQUENCES
    least = foot.layout.request_bytes(fit.request.engine.max_model_len or DEFAULT_LEAST_CONTEXT)
    most = max(KV_MOST_GIB, ceil(least / GIB))
    return min(max(ceil(wanted / GIB), 1), most, int(max(room, 0.0) // GIB)) * GIB
