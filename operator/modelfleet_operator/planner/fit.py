"""What one variant on one accelerator needs, whether it fits, and the plan of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf

import msgspec.structs

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.catalog.engines import EngineDefaults
from modelfleet_operator.planner.capacity import Demand
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.kv_cache import kv_layout
from modelfleet_operator.planner.legality import Verdict
from modelfleet_operator.planner.memory import Footprint, batch_of, footprint
from modelfleet_operator.planner.types import (
    GIB,
    AcceleratorGroup,
    AcceleratorPreference,
    Rejection,
    Rule,
    VariantPlan,
    VariantRequest,
)
from modelfleet_operator.planner.unseen import Sized, cost_of, resources_of
from modelfleet_operator.planner.weights import DTYPE_BYTES
from modelfleet_serving.contract import EngineSettings, Task

DEFAULT_LEAST_CONTEXT = 2048
"""A shorter context than this is no use where the user names none."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One variant on one accelerator, with all that is known of both."""

    request: VariantRequest
    preference: AcceleratorPreference
    group: AcceleratorGroup
    accelerator: Accelerator
    defaults: EngineDefaults
    facts: ModelFacts
    verdict: Verdict

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one unquantized weight."""
        return DTYPE_BYTES[self.verdict.dtype]

    @property
    def context(self) -> int:
        """Tokens of the context that is aimed at."""
        return self.request.engine.max_model_len or self.facts.max_context

    @property
    def least_context(self) -> int:
        """Tokens of the shortest context that is of use: the one asked for, or a default."""
        asked = self.request.engine.max_model_len
        return asked if asked is not None else min(self.context, DEFAULT_LEAST_CONTEXT)

    def footprint(self, settings: EngineSettings, memory_gib: float) -> Footprint:
        """Memory of one rank with these settings."""
        batch = batch_of(settings, self.defaults, self.accelerator, self.context)
        on_cpu = self.accelerator.is_cpu
        layout = kv_layout(
            self.facts,
            block_size=self.defaults.cpu_block_size if on_cpu else self.defaults.block_size,
            dtype_bytes=self.verdict.kv_dtype_bytes,
            tensor_parallel=settings.tensor_parallel_size,
            pipeline_parallel=settings.pipeline_parallel_size,
            in_flight_tokens=batch.tokens * self.defaults.concurrent_batches,
            encoder_tokens=batch.tokens if self.defaults.cross_attention_by_batch else None,
            narrow_state=self.defaults.narrow_state,
        )
        return footprint(
            self.facts,
            self.verdict.scheme,
            settings,
            self.defaults,
            self.accelerator,
            memory_gib=memory_gib,
            dtype_bytes=self.dtype_bytes,
            batch=batch,
            layout=layout,
            generates=self.request.task in {Task.GENERATE, Task.TRANSCRIBE},
        )

    def refuse(self, rule: Rule, message: str, foot: Footprint | None = None) -> Rejection:
        """Why it doesn't run here."""
        return Rejection(self.accelerator.name, rule, message, "memory arithmetic" if foot else "", foot)

    def memory_problem(self, foot: Footprint, context_fits: int) -> Rejection | None:
        """What doesn't fit: the weights, one sequence, or the tokens that the user wants to be held."""
        if foot.kv_cache <= 0:
            usable = foot.memory * foot.share
            text = (
                f"weights {foot.weights / GIB:.1f} GiB and overhead {foot.overhead.total / GIB:.1f} GiB "
                f"don't fit the {usable / GIB:.1f} GiB that the engine may take of a {self.accelerator.name}"
            )
            return self.refuse(Rule.WEIGHTS_DO_NOT_FIT, text, foot)
        if foot.layout.empty:
            return None
        needed = foot.weights + foot.overhead.total + foot.allowance + foot.kv_cache
        if self.request.engine.kv_cache_memory_bytes is not None and needed > foot.memory:
            text = (
                f"weights {foot.weights / GIB:.1f} GiB, overhead {foot.overhead.total / GIB:.1f} GiB and "
                f"{foot.kv_cache / GIB:.1f} GiB of KV cache (kvCacheMemory) exceed the "
                f"{foot.memory / GIB:.1f} GiB of a {self.accelerator.name}"
            )
            return self.refuse(Rule.KV_CACHE_DOES_NOT_FIT, text, foot)
        least = self.least_context
        if context_fits < least:
            text = (
                f"{foot.kv_cache / GIB:.2f} GiB are left for the KV cache, one sequence of {least:,} tokens "
                f"needs {foot.layout.request_bytes(least) / GIB:.2f} GiB: at most {context_fits:,} tokens fit"
            )
            return self.refuse(Rule.KV_CACHE_DOES_NOT_FIT, text, foot)
        tokens = self.request.min_tokens
        held = foot.layout.tokens(foot.kv_cache, min(self.context, context_fits))
        if tokens is not None and held < tokens:
            text = f"the KV cache holds {held:,} tokens, {tokens:,} are asked for"
            return self.refuse(Rule.KV_CACHE_DOES_NOT_FIT, text, foot)
        return None

    def plan(
        self, settings: EngineSettings, foot: Footprint, context: int, demand: Demand, applied: dict[str, str]
    ) -> Sized:
        """The plan of what fits.

        Args:
            settings: the engine's, with the parallel sizes and shares of memory that were chosen.
            foot: memory of one rank.
            context: tokens of the context that fits, at most :attr:`context`.
            demand: what one pipeline stage takes of a node.
            applied: why settings are not those that the user wrote, by field.
        """
        settings, decided = self._decided(settings, context)
        gpus = demand.gpus * demand.nodes
        concurrency = foot.layout.concurrency(foot.kv_cache, context)
        plan = VariantPlan(
            accelerator=self.accelerator.name,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            accelerators_per_replica=gpus,
            max_model_len=context,
            dtype=self.verdict.dtype,
            kv_cache_dtype=self.verdict.kv_cache_dtype,
            weight_scheme=self.verdict.scheme.compute or "unquantized",
            weights_gib=foot.weights / GIB,
            overhead_gib=foot.overhead.total / GIB,
            kv_cache_gib=0.0 if foot.layout.empty else foot.kv_cache / GIB,
            kv_cache_tokens=foot.layout.tokens(foot.kv_cache, context),
            max_sequences=float(foot.batch.sequences) if isinf(concurrency) else concurrency,
            largest_context=self._largest_context(foot, context),
            cost=cost_of(self.group, self.accelerator, gpus),
            engine=settings,
            resources=resources_of(self.group, self.accelerator, demand.cpus, gpus),
            spot=self.group.spot,
            settings=decided | applied,
            memory=foot,
            notes=(*self.verdict.notes, *self._multimodal_notes(context), *self.request.notes),
        )
        return Sized(plan, demand)

    def _largest_context(self, foot: Footprint, context: int) -> int:
        if self.request.engine.max_model_len is None:
            return context
        return max(context, foot.layout.largest_context(foot.kv_cache, self.facts.max_context))

    def _decided(self, settings: EngineSettings, context: int) -> tuple[EngineSettings, dict[str, str]]:
        """Settings with what follows from the checkpoint and the accelerator, and why."""
        why: dict[str, str] = {}
        if settings.max_model_len != context:
            settings = msgspec.structs.replace(settings, max_model_len=context)
            why["maxModelLen"] = "the longest context that fits, up to the model's own"
        if settings.dtype is None and self.verdict.dtype != self.facts.dtype:
            settings = msgspec.structs.replace(settings, dtype=self.verdict.dtype)
            why["dtype"] = f"what {self.accelerator.name} and the quantization can do"
        if self.verdict.quantize_at_load:
            settings = msgspec.structs.replace(settings, quantization=self.verdict.quantize_at_load)
            why["quantization"] = "the engine quantizes the checkpoint while it loads it"
        return settings, why

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
