"""Sizing one variant on one accelerator: legality, memory, parallel sizes, context; not what is free."""

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
    Measurement,
    NodeCapacity,
    Rejection,
    Rule,
    VariantPlan,
    VariantRequest,
)
from modelfleet_operator.planner.unseen import Sized, cost_of, resources_of, simulated, unseen
from modelfleet_operator.planner.weights import DTYPE_BYTES, weights_per_rank
from modelfleet_serving.contract import EngineSettings, Task

SIMULATOR = "Simulator"
GPU_REPLICA_CPUS = 1.0
CPU_REPLICA_CPUS = 0.5
"""Ray's share for a replica on a CPU node where the user names no cores: the engine takes what is idle."""
CPU_KV_SEQUENCES = 8
CPU_KV_MOST_GIB = 8
UNCOUNTED_MEMORY_GIB = 1024.0
"""Host memory of CPU nodes whose memory nobody counts."""
FRACTION_STEP = 5
"""Percent: shares of a GPU are rounded up to it."""
LARGEST_FRACTION = 90
"""Percent: a larger share takes the whole GPU."""
CUDA_CONTEXT_GIB = 0.6
"""Memory of a process on the GPU outside the engine's own accounting (0.51 GiB measured on an H100)."""
PACKED_SEQUENCES = 4
"""Sequences of the full context that a share of a GPU must hold, where the planner chooses it."""
DEFAULT_LEAST_CONTEXT = 2048
"""A shorter context than this is no use where the user names none."""


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
    return _Sizing(request, preference, group, known, defaults, facts, verdict).run()


def pack_variant(
    request: VariantRequest, preference: AcceleratorPreference, group: AcceleratorGroup, whole: VariantPlan
) -> Sized | None:
    """The variant on a share of a GPU, where half of one is enough; for when no whole one is free."""
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
    percent = _rounded_percent(need, known.memory_gib)
    if percent > 50:
        return None
    packed = replace(request, engine=msgspec.structs.replace(engine, gpu_memory_percent=percent))
    sized = size_variant(packed, preference, group)
    return sized if isinstance(sized, Sized) else None


def _rounded_percent(need_gib: float, memory_gib: float) -> int:
    return ceil(100 * need_gib / memory_gib / FRACTION_STEP) * FRACTION_STEP


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
        per_node = min(len(shape.gpus), 1) if self.accelerator.slice else len(shape.gpus)
        last: Rejection | None = None
        hopeless: tuple[int, int] | None = None
        weights = weights_per_rank(self.facts, self.verdict.scheme, self._split(1, 1), self._dtype_bytes)
        for tensor, pipeline in splits(
            self.facts,
            tensor_parallel=fixed,
            pipeline_parallel=stages,
            count=self.preference.count,
            gpus_per_node=per_node,
            nodes=node_count(self.group),
        ):
            if pipeline > 1 and not self.verdict.splits_layers:
                continue
            problem = tensor_parallel_problem(self.facts, tensor)
            if problem is None and tensor > per_node:
                problem = (
                    f"{tensor} GPUs of one node are needed, {self.accelerator.name} nodes have {per_node}"
                )
            if problem is not None:
                return self._refuse(Rule.TENSOR_PARALLEL, problem)
            if weights / (tensor * pipeline) > self.accelerator.memory_gib * GIB:
                hopeless, last = (tensor, pipeline), None  # no split makes a rank smaller than its share
                continue
            outcome = self._on_gpus(tensor, pipeline)
            if isinstance(outcome, Sized):
                return outcome
            last = outcome
        if last is None and hopeless is not None:
            return self._on_gpus(*hopeless)
        return last or self._refuse(Rule.TENSOR_PARALLEL, self._no_split(per_node))

    @property
    def _dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.verdict.dtype]

    def _split(self, tensor: int, pipeline: int) -> EngineSettings:
        return msgspec.structs.replace(
            self.request.engine, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline
        )

    def _no_split(self, per_node: int) -> str:
        if not per_node:
            return f"nodes with {self.accelerator.name} have no GPU"
        return (
            f"{self.preference.count} GPUs can't share {self.facts.heads} attention heads and "
            f"{self.facts.kv_heads} KV heads, with {per_node} on a node"
        )

    def _refuse(self, rule: Rule, message: str, foot: Footprint | None = None) -> Rejection:
        return Rejection(self.accelerator.name, rule, message, "memory arithmetic" if foot else "", foot)

    def _context(self) -> int:
        return self.request.engine.max_model_len or self.facts.max_context

    def _footprint(self, settings: EngineSettings, context: int, memory_gib: float) -> Footprint:
        batch = batch_of(settings, self.defaults, self.accelerator, context)
        on_cpu = self.accelerator.is_cpu
        layout = kv_layout(
            self.facts,
            block_size=self.defaults.cpu_block_size if on_cpu else self.defaults.block_size,
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
            dtype_bytes=self._dtype_bytes,
            batch=batch,
            layout=layout,
            generates=self.request.task in {Task.GENERATE, Task.TRANSCRIBE},
        )

    def _on_gpus(self, tensor: int, pipeline: int) -> Sized | Rejection:
        settings = self._split(tensor, pipeline)
        context = self._context()
        estimate = self._footprint(settings, context, self.accelerator.memory_gib)
        settings, estimate = self._encoder_share(settings, estimate, tensor, pipeline)
        measured = self._measurement(tensor)
        foot = _measured_footprint(estimate, measured)
        fits = foot.layout.largest_context(foot.kv_cache, context)
        problem = self._memory_problem(foot, context, fits)
        if problem is not None:
            return problem
        gpus = float(tensor)
        percent = settings.gpu_memory_percent
        if percent is not None and percent <= LARGEST_FRACTION and tensor * pipeline == 1:
            share = percent / 100 + CUDA_CONTEXT_GIB / self.accelerator.memory_gib
            if self.preference.count is None and share < 1 and not self.defaults.static_share:
                gpus = ceil(share * 100) / 100
        sized = self._plan(settings, foot, min(context, fits), gpus, GPU_REPLICA_CPUS, 0.0)
        if measured is None:
            return sized
        before = Measurement(
            self.accelerator.name,
            tensor,
            estimate.weights / GIB,
            max(estimate.kv_cache, 0.0) / GIB,
            estimate.layout.tokens(estimate.kv_cache, sized.plan.max_model_len or context),
        )
        return replace(sized, plan=replace(sized.plan, measured=measured, estimate=before))

    def _encoder_share(
        self, settings: EngineSettings, foot: Footprint, tensor: int, pipeline: int
    ) -> tuple[EngineSettings, Footprint]:
        """Models without a KV cache get the share that they need: more memory would buy nothing."""
        fixed = settings.gpu_memory_percent is not None or self.preference.count is not None
        if not foot.layout.empty or fixed or tensor * pipeline > 1 or self.defaults.static_share:
            return settings, foot
        need = 1.15 * (foot.weights + foot.overhead.total + foot.overhead.graphs_unreserved) / GIB
        percent = _rounded_percent(need, self.accelerator.memory_gib)
        if percent > 50:
            return settings, foot
        settings = msgspec.structs.replace(settings, gpu_memory_percent=percent)
        return settings, self._footprint(settings, self._context(), self.accelerator.memory_gib)

    def _measurement(self, tensor: int) -> Measurement | None:
        return next(
            (
                m
                for m in self.request.measurements
                if m.accelerator == self.accelerator.name
                and m.tensor_parallel_size == tensor
                and m.kv_cache_gib is not None
            ),
            None,
        )

    def _memory_problem(self, foot: Footprint, context: int, context_fits: int) -> Rejection | None:
        usable = foot.memory * foot.share
        if foot.kv_cache <= 0:
            text = (
                f"weights {foot.weights / GIB:.1f} GiB and overhead {foot.overhead.total / GIB:.1f} GiB "
                f"don't fit the {usable / GIB:.1f} GiB that the engine may take of a {self.accelerator.name}"
            )
            return self._refuse(Rule.WEIGHTS_DO_NOT_FIT, text, foot)
        if foot.layout.empty:
            return None
        asked = self.request.engine.max_model_len
        least = asked if asked is not None else min(context, DEFAULT_LEAST_CONTEXT)
        if context_fits < least:
            text = (
                f"{foot.kv_cache / GIB:.2f} GiB are left for the KV cache, one sequence of {least:,} tokens "
                f"needs {foot.layout.request_bytes(least) / GIB:.2f} GiB: at most {context_fits:,} tokens fit"
            )
            return self._refuse(Rule.KV_CACHE_DOES_NOT_FIT, text, foot)
        tokens = self.request.min_tokens
        held = foot.layout.tokens(foot.kv_cache, min(context, context_fits))
        if tokens is not None and held < tokens:
            text = f"the KV cache holds {held:,} tokens, {tokens:,} are asked for"
            return self._refuse(Rule.KV_CACHE_DOES_NOT_FIT, text, foot)
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
        settings, applied = self._applied(settings, context)
        total = gpus * settings.pipeline_parallel_size
        concurrency = foot.layout.concurrency(foot.kv_cache, context)
        plan = VariantPlan(
            accelerator=self.accelerator.name,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            accelerators_per_replica=total,
            max_model_len=context,
            dtype=self.verdict.dtype,
            kv_cache_dtype=self.verdict.kv_cache_dtype,
            weight_scheme=self.verdict.scheme.compute or "unquantized",
            weights_gib=foot.weights / GIB,
            overhead_gib=foot.overhead.total / GIB,
            kv_cache_gib=0.0 if foot.layout.empty else foot.kv_cache / GIB,
            kv_cache_tokens=foot.layout.tokens(foot.kv_cache, context),
            max_sequences=float(foot.batch.sequences) if isinf(concurrency) else concurrency,
            largest_context=max(
                context
                if self.request.engine.max_model_len is None
                else foot.layout.largest_context(foot.kv_cache, self.facts.max_context),
                context,
            ),
            cost=cost_of(self.group, self.accelerator, total),
            engine=settings,
            resources=resources_of(self.group, self.accelerator, cpus, total),
            spot=self.group.spot,
            settings=applied,
            memory=foot,
            notes=(*self.verdict.notes, *self._multimodal_notes(context)),
        )
        return Sized(plan, Demand(gpus, cpus, host_gib, settings.pipeline_parallel_size))

    def _applied(self, settings: EngineSettings, context: int) -> tuple[EngineSettings, dict[str, str]]:
        """Settings with what the plan decides, and why."""
        applied: dict[str, str] = {}
        if settings.max_model_len != context:
            settings = msgspec.structs.replace(settings, max_model_len=context)
            applied["maxModelLen"] = "the longest context that fits, up to the model's own"
        if settings.dtype is None and self.verdict.dtype != self.facts.dtype:
            settings = msgspec.structs.replace(settings, dtype=self.verdict.dtype)
            applied["dtype"] = f"what {self.accelerator.name} and the quantization can do"
        if self.verdict.quantize_at_load:
            settings = msgspec.structs.replace(settings, quantization=self.verdict.quantize_at_load)
            applied["quantization"] = "the engine quantizes the checkpoint while it loads it"
        if settings.gpu_memory_percent != self.request.engine.gpu_memory_percent:
            applied["gpuMemoryPercent"] = "the share that the model needs"
        if settings.kv_cache_memory_bytes != self.request.engine.kv_cache_memory_bytes:
            applied["kvCacheMemory"] = f"room for {CPU_KV_SEQUENCES} sequences, where the node has it"
        return settings, applied

    def _multimodal_notes(self, context: int) -> tuple[str, ...]:
        vision = self.facts.vision
        if vision is None:
            return ()
        items = self.request.engine.multimodal_limits.get(vision.modality, 1)
        tokens = items * vision.max_item_tokens
        if tokens <= context:
            return ()
        text = (
            f"{items} x {vision.modality} of the largest size would take {tokens:,} tokens, "
            f"the context has {context:,}: such requests are answered with an error"
        )
        return (text,)

    def _on_cpu(self, node: NodeCapacity) -> Sized | Rejection:
        """Weights and KV cache in host memory; the cache is given a size of its own."""
        if self.request.engine.tensor_parallel_size * self.request.engine.pipeline_parallel_size > 1:
            return self._refuse(
                Rule.TENSOR_PARALLEL, "on a CPU one replica is one process: no parallel sizes"
            )
        memory = UNCOUNTED_MEMORY_GIB if isinf(node.memory_gib) else node.memory_gib
        context = self._context()
        asked = self.request.engine.kv_cache_memory_bytes
        probe = msgspec.structs.replace(self.request.engine, kv_cache_memory_bytes=asked or GIB)
        foot = self._footprint(probe, context, memory)
        fixed = foot.weights + foot.overhead.total
        if asked is None:
            asked = self._cpu_kv_cache(foot, context, memory * GIB - fixed)
        foot = replace(foot, kv_cache=float(asked), memory=fixed + asked, share=1.0)
        if fixed + asked > memory * GIB or not asked:
            text = (
                f"weights {foot.weights / GIB:.1f} GiB, runtime {foot.overhead.total / GIB:.1f} GiB and "
                f"{max(asked, GIB) / GIB:.1f} GiB of KV cache exceed the {memory:.1f} GiB of a CPU node"
            )
            return self._refuse(Rule.WEIGHTS_DO_NOT_FIT, text, foot)
        fits = foot.layout.largest_context(asked, context)
        problem = self._memory_problem(foot, context, fits)
        if problem is not None:
            return problem
        need = (fixed + asked) / GIB
        settings = msgspec.structs.replace(
            self.request.engine,
            kv_cache_memory_bytes=asked,
            gpu_memory_percent=min(max(ceil(100 * need / memory), 1), 100),
        )
        cores = float(self.preference.count or min(CPU_REPLICA_CPUS, node.cpus))
        return self._plan(settings, foot, min(context, fits), 0.0, cores, need)

    def _cpu_kv_cache(self, foot: Footprint, context: int, room: float) -> int:
        """Whole GiB for some sequences of the context, within what the node has."""
        wanted = foot.layout.request_bytes(context) * CPU_KV_SEQUENCES
        least = foot.layout.request_bytes(self.request.engine.max_model_len or DEFAULT_LEAST_CONTEXT)
        most = max(CPU_KV_MOST_GIB, ceil(least / GIB))
        return min(max(ceil(wanted / GIB), 1), most, int(max(room, 0.0) // GIB)) * GIB


def _measured_footprint(foot: Footprint, measured: Measurement | None) -> Footprint:
    if measured is None or measured.kv_cache_gib is None:
        return foot
    weights = foot.weights if measured.weights_gib is None else measured.weights_gib * GIB
    return replace(foot, weights=weights, kv_cache=measured.kv_cache_gib * GIB)
