"""What holds for every model, accelerator and pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.benchmarks.planner import pool_of, requests_of
from tests.unit.planner.measured import all_configs

from modelfleet_operator.catalog.accelerators import accelerator, accelerators
from modelfleet_operator.planner import (
    AcceleratorGroup,
    AcceleratorPreference,
    NodeCapacity,
    PoolView,
    VariantRequest,
    placement,
    plan_all,
    plan_variant,
)
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.parallel import tensor_parallel_problem
from modelfleet_operator.planner.quantization import checkpoint_names
from modelfleet_operator.planner.sizing import size_variant
from modelfleet_serving.contract import EngineSettings

FACTS = [c.facts for c in all_configs()]
GPUS = [name for name, kind in accelerators().items() if not kind.is_cpu]


def declared(facts: ModelFacts) -> str:
    return min(checkpoint_names(facts.quantization))


@st.composite
def requests(draw: st.DrawFn) -> VariantRequest:
    facts = draw(st.sampled_from(FACTS))
    return VariantRequest(
        facts,
        declared(facts),
        EngineSettings(
            type=draw(st.sampled_from(["vLLM", "SGLang"])),
            max_model_len=draw(st.sampled_from([None, 512, 4096, 16384])),
            max_num_seqs=draw(st.sampled_from([None, 16, 256])),
            gpu_memory_percent=draw(st.sampled_from([None, None, 30, 60, 90])),
        ),
        replicas=draw(st.integers(0, 3)),
    )


@st.composite
def pools(draw: st.DrawFn) -> PoolView:
    groups = []
    for name in draw(st.lists(st.sampled_from(GPUS), min_size=1, max_size=4, unique=True)):
        gpus = draw(st.sampled_from([1, 2, 4, 8]))
        node = NodeCapacity((1.0,) * gpus, count=draw(st.integers(1, 3)))
        groups.append(
            AcceleratorGroup(
                name, (node,), NodeCapacity((1.0,) * gpus), draw(st.integers(0, 2)), draw(st.booleans())
            )
        )
    return PoolView(tuple(groups))


@settings(max_examples=60, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=8), pools())
def test_plans_never_exceed_what_there_is(asked: list[VariantRequest], pool: PoolView) -> None:
    results = plan_all({str(n): request for n, request in enumerate(asked)}, pool)
    for group in pool.groups:
        total = sum(len(n.gpus) * n.count for n in group.nodes)
        total += group.obtainable_nodes * len(group.template.gpus if group.template else ())
        held = sum(
            result.plan.accelerators_per_replica * (request.replicas - result.short)
            for request, result in zip(asked, results.values(), strict=True)
            if result.plan is not None and result.plan.accelerator == group.accelerator
        )
        assert held <= total + 1e-6


@settings(max_examples=120, deadline=None)
@given(requests(), pools())
def test_a_plan_fits_its_gpu_and_is_legal(request: VariantRequest, pool: PoolView) -> None:
    result = plan_variant(request, pool)
    plan = result.plan
    if plan is None:
        assert result.rejections
        assert all(r.message for r in result.rejections)
        return
    assert isinstance(request.model, ModelFacts)
    assert (plan.max_model_len or 0) <= request.model.max_context
    kind = accelerator(plan.accelerator)
    assert kind is not None
    assert tensor_parallel_problem(request.model, plan.tensor_parallel_size) is None
    outside = plan.overhead_gib if request.engine.type == "SGLang" else 0.0
    assert plan.weights_gib + plan.overhead_gib + plan.kv_cache_gib <= kind.memory_gib + outside + 1e-6
    assert plan.dtype in kind.dtypes
    if request.engine.max_model_len is not None:
        assert plan.max_model_len == request.engine.max_model_len
    if plan.kv_cache_tokens:
        assert plan.max_sequences >= 1
        assert plan.largest_context >= (plan.max_model_len or 0)
    assert plan.engine.tensor_parallel_size == plan.tensor_parallel_size
    assert 1 <= plan.cost_rank <= len(result.candidates)


@settings(max_examples=80, deadline=None)
@given(requests(), st.sampled_from(["A100-40G", "H100"]), st.sampled_from([1, 2, 4]))
def test_more_memory_never_fits_worse(request: VariantRequest, smaller: str, gpus: int) -> None:
    larger = {"A100-40G": "A100-80G", "H100": "H200"}[smaller]
    request = replace(request, replicas=1)
    before, after = (
        plan_variant(request, PoolView((AcceleratorGroup(name, (NodeCapacity((1.0,) * gpus, count=2),)),)))
        for name in (smaller, larger)
    )
    if before.plan is None:
        return
    assert after.plan is not None
    assert after.plan.tensor_parallel_size <= before.plan.tensor_parallel_size
    ranks = before.plan.tensor_parallel_size * before.plan.pipeline_parallel_size
    if ranks == after.plan.tensor_parallel_size * after.plan.pipeline_parallel_size:
        assert after.plan.kv_cache_tokens >= before.plan.kv_cache_tokens
        assert (after.plan.max_model_len or 0) >= (before.plan.max_model_len or 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=5), pools())
def test_the_same_question_gets_the_same_answer(asked: list[VariantRequest], pool: PoolView) -> None:
    question = {str(n): request for n, request in enumerate(asked)}
    assert plan_all(question, pool) == plan_all(question, pool)


def test_a_variant_is_sized_at_most_once_for_each_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    # What planning costs: sizing. How long that takes is `make bench-planner`'s to tell.
    asked = requests_of(200)
    sized: Counter[tuple[str, str]] = Counter()

    def counted(
        request: VariantRequest, preference: AcceleratorPreference, group: AcceleratorGroup
    ) -> object:
        assert isinstance(request.model, ModelFacts)
        sized[request.model.source, group.accelerator] += 1
        return size_variant(request, preference, group)

    monkeypatch.setattr(placement, "size_variant", counted)
    results = plan_all(asked, pool_of(50))
    assert all(r.fits or r.rejections for r in results.values())
    assert max(sized.values()) == 1
    again = plan_all(
        {**asked, **{f"twin of {name}": request for name, request in asked.items()}}, pool_of(50)
    )
    assert len(again) == 400
    assert max(sized.values()) == 2  # once in each round of planning: twins share it
