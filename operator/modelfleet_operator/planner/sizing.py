"""Sizing one variant on one accelerator: legality, memory, parallel sizes, context. No regard to what is free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, isinf

import msgspec.structs

from modelfleet_operator.catalog.accelerators import Accelerator, accelerator
from modelfleet_operator.catalog.engines import EngineDefaults, engine_defaults
from modelfleet_operator.planner.capacity import Demand, node_count, node_shape
from modelfleet_operator.planner.facts import ModelFacts, ModelUnavailable
from modelfleet_operator.planner.kv_cache import kv_layout
from modelfleet_operator.planner.legality import Verdict, judge
from modelfleet_operator.planner.memory import Footprint, batch_of, footprint
from modelfleet_operator.planner.parallel import splits, tensor_parallel_problem
from modelfleet_operator.planner.types import (
    GIB,
    AcceleratorGroup,
    AcceleratorPreference,
    NodeCapacity,
    Rejection,
    Rule,
    VariantPlan,
    VariantRequest,
)
from modelfleet_operator.planner.weights import DTYPE_BYTES
from modelfleet_serving.contract import EngineSettings, ReplicaResources, Task

SIMULATOR = "Simulator"
SIMULATOR_CPUS = 0.1
GPU_REPLICA_CPUS = 1.0
CPU_REPLICA_CPUS = 0.5
"""Ray's share for a replica on a CPU node where the user names no cores: the engine takes what is idle."""
CPU_KV_SEQUENCES = 8
CPU_KV_MOST_GIB = 8
FRACTION_STEP = 0.05
CUDA_CONTEXT_GIB = 0.6
"""Memory of a process on the GPU outside the engine's own accounting."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A plan with what one replica takes of the pool."""

    plan: VariantPlan
    demand: Demand


def size_variant(
    request: VariantRequest, preference: AcceleratorPreference, group: AcceleratorGroup
) -> Sized | Rejection:
    """The smallest way to run a variant on a group's nodes, or why there is none."""
    known = accelerator(group.accelerator)
    if request.engine.type == SIMULATOR:
        return _simulator(request, preference, group, known)
    if known is None:
        return Rejection(
            group.accelerator,
            Rule.ACCELERATOR_UNKNOWN,
            f"{group.accelerator} is not in the catalogue of accelerators",
        )
    defaults = engine_defaults(request.engine.type, request.engine.version)
    if defaults is None:
        return Rejection(known.name, Rule.ENGINE_NOT_SUPPORTED, f"{request.engine.type} is no known engine")
    facts = request.model
    if facts is None or isinstance(facts, ModelUnavailable):
        return _unavailable(facts, known.name)
    verdict = judge(request, facts, known)
    if isinstance(verdict, Rejection):
        return verdict
    return _Sizing(request, preference, group, known, defaults, facts, verdict).run()


def _unavailable(facts: ModelUnavailable | None, accelerator_name: str) -> Rejection:
    if facts is None:
        return Rejection(accelerator_name, Rule.MODEL_UNAVAILABLE, "nothing is known of the model yet",
                         retryable=True)  # fmt: skip
    return Rejection(
        accelerator_name,
        Rule.MODEL_UNAVAILABLE,
        f"{facts.reason}: {facts.message}",
        retryable=facts.retryable,
    )


def _simulator(
    request: VariantRequest,
    preference: AcceleratorPreference,
    group: AcceleratorGroup,
    known: Accelerator | None,
) -> Sized:
    """The simulator fits anywhere: it holds the accelerators asked for and needs no memory."""
    on_cpu = known is not None and known.is_cpu
    gpus = 0.0 if on_cpu else float(preference.count or request.engine.tensor_parallel_size)
    context = request.engine.max_model_len or 32768
    plan = VariantPlan(
        accelerator=group.accelerator,
        tensor_parallel_size=request.engine.tensor_parallel_size,
        pipeline_parallel_size=1,
        accelerators_per_replica=gpus,
        max_model_len=context,
        dtype="none",
        kv_cache_dtype="none",
        weight_scheme="simulated",
        weights_gib=0.0,
        overhead_gib=0.0,
        kv_cache_gib=0.0,
        kv_cache_tokens=context * 16,
        max_sequences=16,
        largest_context=context,
        cost=_cost(group, known, gpus),
        engine=request.engine,
        resources=_resources(group, known, SIMULATOR_CPUS, gpus),
        spot=group.spot,
        notes=("simulated: no model is loaded",),
    )
    return Sized(plan, Demand(gpus, SIMULATOR_CPUS, 0.0))


def _cost(group: AcceleratorGroup, known: Accelerator | None, gpus: float) -> float:
    each = group.relative_cost
    if each is None:
        each = (known.relative_cost if known else 1.0) * (0.4 if group.spot else 1.0)
    return round(each * (gpus or 1.0), 3)


def _resources(
    group: AcceleratorGroup, known: Accelerator | None, cpus: float, gpus: float
) -> ReplicaResources:
    if known is not None and known.is_cpu:
        marks = {group.ray_resource: 0.001} if group.ray_resource else {}
        return ReplicaResources(num_cpus=cpus, resources=marks)
    if group.ray_resource:
        return ReplicaResources(num_cpus=cpus, num_gpus=gpus, resources={group.ray_resource: 0.001})
    return ReplicaResources(num_cpus=cpus, num_gpus=gpus, accelerator_type=known.ray_type if known else None)


@dataclass(frozen=True, slots=True)
class _Sizing:
    """One sizing, with its inputs at hand."""

    request: VariantRequest
    preference: AcceleratorPreference
    group: AcceleratorGroup
    accelerator: Accelerator
    defaults: EngineDefaults
    facts: ModelFacts
    verdict: Verdict

    def run(self) -> Sized | Rejection:
        shape = node_shape(self.group)
        if self.accelerator.is_cpu:
            return self._on_cpu(shape)
        engine = self.request.engine
        fixed = engine.tensor_parallel_size if engine.tensor_parallel_size > 1 else None
        stages = engine.pipeline_parallel_size if engine.pipeline_parallel_size > 1 else None
        best: Rejection | None = None
        per_node = 1 if self.accelerator.slice else len(shape.gpus)
        for tensor, pipeline in splits(
            self.facts,
            tensor_parallel=fixed,
            pipeline_parallel=stages,
            count=self.preference.count,
            gpus_per_node=per_node,
            nodes=node_count(self.group),
        ):
            problem = tensor_parallel_problem(self.facts, tensor)
            if problem or tensor > per_node:
                text = (
                    problem
                    or f"{tensor} GPUs of one node are needed, {self.accelerator.name} nodes have {per_node}"
                )
                return Rejection(self.accelerator.name, Rule.TENSOR_PARALLEL, text)
            outcome = self._with(tensor, pipeline)
            if isinstance(outcome, Sized):
                return outcome
            best = outcome
        if best is None:
            count = self.preference.count
            text = (
                f"no tensor parallel size for {count} GPUs: {self.facts.heads} attention heads"
                if count
                else "nodes have no GPU"
            )
            return Rejection(self.accelerator.name, Rule.TENSOR_PARALLEL, text)
        return best

    def _context(self) -> int:
        return self.request.engine.max_model_len or self.facts.max_context

    def _footprint(self, settings: EngineSettings, context: int, memory_gib: float) -> Footprint:
        batch = batch_of(settings, self.defaults, self.accelerator, context)
        layout = kv_layout(
            self.facts,
            block_size=self.defaults.cpu_block_size if self.accelerator.is_cpu else self.defaults.block_size,
            dtype_bytes=self.verdict.kv_dtype_bytes,
            tensor_parallel=settings.tensor_parallel_size,
            pipeline_parallel=settings.pipeline_parallel_size,
            in_flight_tokens=batch.tokens * self.defaults.concurrent_batches,
        )
        return footprint(
            self.facts,
            self.verdict.scheme,
            settings,
            self.defaults,
            self.accelerator,
            memory_gib=memory_gib,
            dtype_bytes=DTYPE_BYTES[self.verdict.dtype],
            batch=batch,
            layout=layout,
            generates=self.request.task in {Task.GENERATE, Task.TRANSCRIBE},
        )

    def _with(self, tensor: int, pipeline: int) -> Sized | Rejection:
        settings = msgspec.structs.replace(
            self.request.engine, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline
        )
        context = self._context()
        foot = self._footprint(settings, context, self.accelerator.memory_gib)
        context_fits = foot.layout.largest_context(foot.kv_cache, context)
        rejection = self._memory_problem(foot, context, context_fits)
        if rejection is not None:
            return rejection
        return self._plan(settings, foot, min(context, context_fits), float(tensor), GPU_REPLICA_CPUS, 0.0)

    def _memory_problem(self, foot: Footprint, context: int, context_fits: int) -> Rejection | None:
        settings_gpus = f"{self.accelerator.name}"
        usable = foot.memory * foot.share
        if foot.weights + foot.overhead.total >= usable:
            return Rejection(
                self.accelerator.name,
                Rule.WEIGHTS_DO_NOT_FIT,
                f"weights {foot.weights / GIB:.1f} GiB and overhead {foot.overhead.total / GIB:.1f} GiB "
                f"exceed the {usable / GIB:.1f} GiB of {settings_gpus}",
                arithmetic=foot.lines(),
            )
        if foot.layout.empty:
            return None
        asked = self.request.engine.max_model_len
        least = self.request.min_tokens or (asked if asked is not None else min(context, 2048))
        if context_fits < least:
            return Rejection(
                self.accelerator.name,
                Rule.KV_CACHE_DOES_NOT_FIT,
                f"{max(foot.kv_cache, 0) / GIB:.2f} GiB are left for the KV cache, one sequence of "
                f"{least:,} tokens needs {foot.layout.request_bytes(least) / GIB:.2f} GiB: "
                f"at most {context_fits:,} tokens fit",
                arithmetic=foot.lines(),
            )
        return None

    def _plan(
        self,
        settings: EngineSettings,
        foot: Footprint,
        context: int,
        gpus: float,
        cpus: float,
        host_gib: float,
    ) -> Sized:
        applied: dict[str, str] = {}
        if settings.max_model_len != context:
            settings = msgspec.structs.replace(settings, max_model_len=context)
            applied["max_model_len"] = "the longest context that fits"
        if settings.dtype is None and self.verdict.dtype != self.facts.dtype:
            settings = msgspec.structs.replace(settings, dtype=self.verdict.dtype)
            applied["dtype"] = f"{self.accelerator.name} has no {self.facts.dtype}"
        if self.verdict.quantize_at_load:
            settings = msgspec.structs.replace(settings, quantization=self.verdict.quantize_at_load)
            applied["quantization"] = "the engine quantizes the checkpoint at load"
        stages = settings.pipeline_parallel_size
        total = gpus * stages
        concurrency = foot.layout.concurrency(foot.kv_cache, context)
        plan = VariantPlan(
            accelerator=self.accelerator.name,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=stages,
            accelerators_per_replica=total,
            max_model_len=context,
            dtype=self.verdict.dtype,
            kv_cache_dtype=self.verdict.kv_cache_dtype,
            weight_scheme=self.verdict.scheme.compute or self.verdict.scheme.name,
            weights_gib=foot.weights / GIB,
            overhead_gib=foot.overhead.total / GIB,
            kv_cache_gib=max(foot.kv_cache, 0.0) / GIB,
            kv_cache_tokens=foot.layout.tokens(foot.kv_cache, context),
            max_sequences=float(foot.batch.sequences) if isinf(concurrency) else concurrency,
            largest_context=foot.layout.largest_context(foot.kv_cache, self.facts.max_context),
            cost=_cost(self.group, self.accelerator, total),
            engine=settings,
            resources=_resources(self.group, self.accelerator, cpus, total),
            spot=self.group.spot,
            settings=applied,
            arithmetic=foot.lines(),
            notes=self.verdict.notes,
        )
        return Sized(plan, Demand(gpus, cpus, host_gib, stages))

    def _on_cpu(self, node: NodeCapacity) -> Sized | Rejection:
        """Weights and KV cache in host memory; the cache is given a size of its own."""
        if self.request.engine.tensor_parallel_size > 1:
            return Rejection(
                self.accelerator.name, Rule.TENSOR_PARALLEL, "on a CPU one replica is one process"
            )
        memory = node.memory_gib if not isinf(node.memory_gib) else 1024.0
        context = self._context()
        asked = self.request.engine.kv_cache_memory_bytes
        probe = msgspec.structs.replace(self.request.engine, kv_cache_memory_bytes=asked or GIB)
        foot = self._footprint(probe, context, memory)
        fixed = foot.weights + foot.overhead.total
        if asked is None:
            room = memory * GIB - fixed
            wanted = foot.layout.request_bytes(min(context, 8192)) * CPU_KV_SEQUENCES
            size = min(max(ceil(wanted / GIB), 1), CPU_KV_MOST_GIB, int(max(room, 0) // GIB))
            asked = size * GIB
        foot = replace(foot, kv_cache=float(asked), memory=fixed + asked)
        if fixed + asked > memory * GIB or asked == 0:
            return Rejection(
                self.accelerator.name, Rule.WEIGHTS_DO_NOT_FIT,
                f"weights {foot.weights / GIB:.1f} GiB, runtime {foot.overhead.total / GIB:.1f} GiB and KV cache "
                f"{max(asked, GIB) / GIB:.1f} GiB exceed the node's {memory:.1f} GiB", arithmetic=foot.lines(),
            )  # fmt: skip
        fits = foot.layout.largest_context(asked, context)
        problem = self._memory_problem(foot, context, fits) if not foot.layout.empty else None
        if problem is not None and problem.rule is Rule.KV_CACHE_DOES_NOT_FIT:
            return problem
        need = (fixed + asked) / GIB
        settings = msgspec.structs.replace(
            self.request.engine,
            kv_cache_memory_bytes=asked,
            gpu_memory_percent=min(max(ceil(100 * need / memory), 1), 100),
        )
        cores = float(self.preference.count) if self.preference.count else min(CPU_REPLICA_CPUS, node.cpus)
        return self._plan(settings, foot, min(context, fits), 0.0, cores, need)
