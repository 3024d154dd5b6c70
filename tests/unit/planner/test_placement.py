"""Several variants on one pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.planner.measured import config, pool

from modelfleet_operator.planner import (
    AcceleratorGroup,
    AcceleratorPreference,
    Measurement,
    ModelUnavailable,
    NodeCapacity,
    PlanResult,
    PoolView,
    VariantRequest,
    plan_all,
    plan_variant,
)
from modelfleet_operator.planner.types import Rule
from modelfleet_serving.contract import EngineSettings, Task

LLAMA = config("meta-llama/Llama-3.1-8B-Instruct").facts
SMALL = config("Qwen/Qwen2.5-0.5B-Instruct").facts
CONTEXT = EngineSettings(type="vLLM", max_model_len=8192)


def on(*types: str, **fields: Any) -> VariantRequest:
    return VariantRequest(
        LLAMA, engine=CONTEXT, accelerators=tuple(AcceleratorPreference(t) for t in types), **fields
    )


def group(name: str, *, gpus: int = 1, nodes: int = 0, more: int = 0, **fields: object) -> AcceleratorGroup:
    node = NodeCapacity((1.0,) * gpus)
    running = (replace(node, count=nodes),) if nodes else ()
    return AcceleratorGroup(name, running, node, more, **fields)  # type: ignore[arg-type]


def test_two_plans_never_share_a_gpu() -> None:
    results = plan_all({"a": on("A10"), "b": on("A10")}, pool("A10"))
    assert results["a"].fits
    assert results["b"].reason == "AcceleratorsNotFree"
    assert results["b"].retryable


def test_the_next_preference_takes_over() -> None:
    results = plan_all({"a": on("A100-80G", "A10"), "b": on("A100-80G", "A10")}, pool("A100-80G", "A10"))
    assert [r.plan and r.plan.accelerator for r in results.values()] == ["A100-80G", "A10"]
    assert [r.rule for r in results["b"].rejections] == [Rule.NONE_FREE]


def test_without_preferences_the_cheapest_that_fits() -> None:
    result = plan_variant(on(), pool("H100", "A10", "T4"))
    assert result.plan is not None
    assert result.plan.accelerator == "A10"
    assert result.plan.cost_rank == 1


def test_what_runs_keeps_its_accelerator() -> None:
    requests = {"new": on("A10", "H100"), "old": on("A10", "H100", current="A10")}
    results = plan_all(requests, pool("A10", "H100"))
    assert results["old"].plan
    assert results["old"].plan.accelerator == "A10"
    assert results["new"].plan
    assert results["new"].plan.accelerator == "H100"


def test_what_is_pending_too_long_falls_to_the_next() -> None:
    groups = (group("A100-80G", more=1, pending_too_long=True), group("A10", nodes=1))
    result = plan_variant(on("A100-80G", "A10"), PoolView(groups))
    assert result.plan
    assert result.plan.accelerator == "A10"
    assert result.rejections[0].rule is Rule.PENDING_TOO_LONG
    waiting = PoolView((replace(groups[0], pending_too_long=False), groups[1]))
    result = plan_variant(on("A100-80G", "A10"), waiting)
    assert result.plan
    assert result.plan.accelerator == "A100-80G"
    assert result.plan.placed_now == 0
    assert "wait for new nodes" in result.message


def test_replicas_are_all_placed_or_none() -> None:
    result = plan_variant(
        on("A10", "L40S", replicas=3), PoolView((group("A10", nodes=2), group("L40S", nodes=3)))
    )
    assert result.plan
    assert result.plan.accelerator == "L40S"
    assert result.plan.placed_now == 3


def test_no_replica_is_a_question_and_holds_nothing() -> None:
    results = plan_all({"asleep": on("A10", replicas=0), "awake": on("A10")}, pool("A10"))
    assert results["asleep"].fits
    assert results["awake"].fits


def test_spot_is_cheaper() -> None:
    result = plan_variant(on(), PoolView((group("A10", nodes=1), group("L40S", nodes=1, spot=True))))
    assert result.plan
    assert (result.plan.accelerator, result.plan.spot) == ("L40S", True)


def test_small_models_share_a_gpu_when_no_whole_one_is_free() -> None:
    request = VariantRequest(SMALL, engine=EngineSettings(type="vLLM", max_model_len=4096))
    shared = EngineSettings(type="vLLM", max_model_len=4096, gpu_memory_percent=40)
    results = plan_all({"a": replace(request, engine=shared), "b": request}, pool("A10"))
    shares = [r.plan.accelerators_per_replica for r in results.values() if r.plan]
    assert len(shares) == 2
    assert all(share < 1 for share in shares)
    assert sum(shares) <= 1
    percents = [r.plan.engine.gpu_memory_percent for r in results.values() if r.plan]
    assert all(p is not None and p / 100 < share for p, share in zip(percents, shares, strict=True))


def _shares(results: dict[str, PlanResult]) -> list[float | None]:
    return [r.plan.accelerators_per_replica if r.plan else None for r in results.values()]


def small(**fields: Any) -> VariantRequest:
    return VariantRequest(SMALL, engine=EngineSettings(type="vLLM", max_model_len=4096), **fields)


def test_new_small_models_share_the_only_gpu() -> None:
    results = plan_all({"a": small(), "b": small()}, pool("H100"))
    shares = [share or 0.0 for share in _shares(results)]
    assert all(0 < share <= 0.55 for share in shares)
    assert all(r.fits for r in results.values())
    assert all(r.plan and r.plan.engine.gpu_memory_percent for r in results.values())


def test_no_more_share_than_have_to() -> None:
    results = plan_all({name: small() for name in "abcde"}, PoolView((group("H100", gpus=3, nodes=1),)))
    shares = [share or 0.0 for share in _shares(results)]
    assert shares[:2] == [1.0, 1.0]
    assert all(0 < share < 1 for share in shares[2:])


def test_a_large_one_gets_the_gpu_that_small_ones_can_spare() -> None:
    requests = {"a": small(), "b": small(), "large": on("A10")}
    results = plan_all(requests, PoolView((group("A10", gpus=2, nodes=1),)))
    assert all(r.fits for r in results.values())
    shares = _shares(results)
    assert shares[2] == 1.0
    assert all(share and share < 1 for share in shares[:2])


def test_what_runs_on_a_whole_gpu_does_not_make_room() -> None:
    results = plan_all({"runs": small(current="H100"), "new": small()}, pool("H100"))
    assert _shares(results) == [1.0, None]
    assert results["new"].reason == "AcceleratorsNotFree"


@pytest.mark.parametrize("step", [0, 5])
def test_what_runs_on_a_share_keeps_it(step: int) -> None:
    """Also when the whole GPU has become free, or the estimate moved by a step: another share restarts it."""
    first = plan_all({"a": small(), "b": small()}, pool("A10"))["a"].plan
    assert first
    assert first.engine.gpu_memory_percent
    percent = first.engine.gpu_memory_percent + step
    again = plan_all({"a": small(current="A10", current_percent=percent)}, pool("A10"))["a"].plan
    assert again
    assert again.engine.gpu_memory_percent == percent
    assert again.accelerators_per_replica < 1
    needs_more = plan_all({"a": small(current="A10", current_percent=5)}, pool("A10"))["a"].plan
    assert needs_more
    assert needs_more.engine == first.engine


def test_what_was_measured_on_a_whole_gpu_says_nothing_of_a_share() -> None:
    whole = Measurement("H100", 1, 0.93, 70.0, 6_000_000)
    fresh = plan_all({"a": small(), "b": small()}, pool("H100"))
    again = plan_all({"a": small(measurements=(whole,)), "b": small()}, pool("H100"))
    assert fresh["a"].plan == again["a"].plan
    alone = plan_variant(small(measurements=(whole,)), pool("H100")).plan
    assert alone
    assert alone.measured == whole


def test_encoders_take_the_share_that_they_need() -> None:
    facts = config("BAAI/bge-large-en-v1.5").facts
    requests = {str(n): VariantRequest(facts, task=Task.EMBED) for n in range(4)}
    results = plan_all(requests, pool("A10"))
    assert all(r.fits for r in results.values())
    plan = results["0"].plan
    assert plan
    assert plan.accelerators_per_replica <= 0.25
    assert plan.kv_cache_tokens == 0


def test_measurements_beat_estimates() -> None:
    measured = Measurement("A10", 1, weights_gib=15.1, kv_cache_gib=2.5, kv_cache_tokens=20480)
    result = plan_variant(on("A10", measurements=(measured,)), pool("A10"))
    plan = result.plan
    assert plan
    assert plan.measured == measured
    assert (plan.weights_gib, plan.kv_cache_gib, plan.kv_cache_tokens) == (15.1, 2.5, 20480)
    assert plan.estimate
    assert plan.estimate.kv_cache_gib
    assert plan.estimate.kv_cache_gib > 2.9
    too_small = replace(measured, kv_cache_gib=0.5)
    refused = plan_variant(on("A10", measurements=(too_small,)), pool("A10"))
    assert refused.reason == "KVCacheDoesNotFit"


def test_the_simulator_needs_no_facts_and_fits_anywhere() -> None:
    request = VariantRequest(None, "FP8", EngineSettings(type="Simulator", max_model_len=4096))
    for where in ("CPU", "T4", "H100"):
        plan = plan_variant(request, pool(where)).plan
        assert plan
        assert plan.max_model_len == 4096
    assert plan_variant(request, pool("CPU")).plan.resources.num_gpus == 0  # type: ignore[union-attr]


def test_a_checkpoint_that_cannot_be_seen_runs_as_asked() -> None:
    facts = ModelUnavailable("SourceNotMounted", "not mounted here", retryable=True, unseen=True)
    request = VariantRequest(facts, accelerators=(AcceleratorPreference("A10", 2),))
    plan = plan_variant(request, pool("A10", gpus=2)).plan
    assert plan
    assert plan.resources.num_gpus == 2
    assert "not checked" in plan.notes[0]


def test_what_is_wrong_with_the_model_is_said_once() -> None:
    facts = ModelUnavailable("Gated", "hf://x/y is gated")
    result = plan_variant(VariantRequest(facts, engine=CONTEXT), pool("A10", "T4", "H100"))
    assert result.reason == "ModelUnavailable"
    assert result.message == "Gated: hf://x/y is gated"
    assert len(result.rejections) == 1
    assert not result.retryable


def test_rejections_carry_the_arithmetic() -> None:
    facts = config("meta-llama/Llama-3.1-70B-Instruct").facts
    result = plan_variant(VariantRequest(facts, engine=CONTEXT), pool("A10"))
    (rejection,) = result.rejections
    assert rejection.rule is Rule.WEIGHTS_DO_NOT_FIT
    assert any("weights" in line for line in rejection.arithmetic)
    assert "131" in rejection.message  # GiB of weights


def test_tensor_then_pipeline_parallel() -> None:
    facts = config("meta-llama/Llama-3.1-70B-Instruct").facts
    request = VariantRequest(facts, engine=CONTEXT)
    plan = plan_variant(request, pool("L40S", gpus=8)).plan
    assert plan
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size) == (4, 1)
    plan = plan_variant(request, pool("L40S", gpus=2, nodes=4)).plan
    assert plan
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size) == (2, 2)
    assert plan.resources.num_gpus == 4


def test_a_count_fixes_the_gpus() -> None:
    request = VariantRequest(LLAMA, engine=CONTEXT, accelerators=(AcceleratorPreference("A10", 4),))
    plan = plan_variant(request, pool("A10", gpus=4)).plan
    assert plan
    assert plan.tensor_parallel_size == 4
    odd = replace(request, accelerators=(AcceleratorPreference("A10", 3),))
    plan = plan_variant(odd, pool("A10", gpus=4)).plan
    assert plan is None or plan.pipeline_parallel_size == 3


def test_cpu_variants_share_the_memory_of_a_node() -> None:
    request = VariantRequest(LLAMA, engine=CONTEXT)
    view = PoolView((AcceleratorGroup("CPU", (NodeCapacity((), 16, 40),)),))
    results = plan_all({"a": request, "b": request}, view)
    assert results["a"].fits
    assert results["b"].reason == "AcceleratorsNotFree"
    plan = results["a"].plan
    assert plan
    assert plan.engine.kv_cache_memory_bytes
    assert plan.engine.kv_cache_memory_bytes % 2**30 == 0
    assert plan.resources.num_gpus == 0


def test_unknown_and_absent_accelerators() -> None:
    result = plan_variant(on("A10", "Z9"), PoolView((group("Z9", nodes=1),)))
    assert [r.rule for r in result.rejections] == [Rule.NOT_IN_POOL, Rule.ACCELERATOR_UNKNOWN]


@pytest.mark.parametrize("asked", [None, 131072])
def test_the_context_is_shortened_only_where_none_is_asked_for(asked: int | None) -> None:
    request = VariantRequest(LLAMA, engine=EngineSettings(type="vLLM", max_model_len=asked))
    result = plan_variant(request, pool("A10"))
    if asked:
        assert result.reason == "KVCacheDoesNotFit"
    else:
        assert result.plan
        assert 2048 < (result.plan.max_model_len or 0) < 131072
        assert "maxModelLen" in result.plan.settings


def test_a_checkpoint_that_breaks_the_arithmetic_keeps_no_other_from_its_plan() -> None:
    layers = replace(LLAMA.attention[0], key_dim=0, value_dim=0)
    broken = replace(on("A10"), model=replace(LLAMA, attention=(layers,)))
    results = plan_all({"a": broken, "b": on("A10")}, pool("A10"))
    assert results["a"].reason == "PlannerFailed"
    assert not results["a"].retryable
    assert results["b"].fits


@pytest.mark.parametrize(
    ("engine", "args", "env", "words"),
    [
        ("vLLM", {"port": 1}, {}, ("engine.args.port", "the platform")),
        ("vLLM", {"tensor_parallel_size": 2}, {}, ("engine.args.tensor_parallel_size", "tensorParallelSize")),
        ("vLLM", {"no-enable-prefix-caching": True}, {}, ("engine.prefixCaching",)),
        ("vLLM", {"limit-mm-per-prompt.image": 2}, {}, ("engine.multimodal",)),
        ("vLLM", {}, {"VLLM_API_KEY": "geheim"}, ("engine.env.VLLM_API_KEY", "the router")),
        ("SGLang", {"mem-fraction-static": 0.9}, {}, ("engine.gpuMemoryPercent",)),
    ],
)
def test_options_that_something_else_sets_are_refused_before_a_node_is_bought(
    engine: str, args: dict[str, object], env: dict[str, str], words: tuple[str, ...]
) -> None:
    unread = ModelUnavailable("UnsupportedSource", "oci://", unseen=True)
    settings = EngineSettings(type=engine, args=args, env=env)
    for model in (unread, LLAMA, None):
        result = plan_variant(VariantRequest(model, engine=settings), pool("A100-80G"))
        assert result.reason == "EngineSettingsReserved"
        assert all(word in result.message for word in words)
        assert "geheim" not in result.message
        assert not result.retryable


def test_a_kv_cache_that_no_gpu_has_room_for_is_refused() -> None:
    def planned(gib: int) -> PlanResult:
        engine = EngineSettings(type="vLLM", max_model_len=8192, kv_cache_memory_bytes=gib * 2**30)
        return plan_variant(VariantRequest(LLAMA, engine=engine), pool("A100-80G"))

    assert planned(20).fits
    result = planned(500)
    assert not result.fits
    assert result.reason == "KVCacheDoesNotFit"
    assert "500.0 GiB of KV cache" in result.message


def test_an_engine_older_than_everything_known_is_refused() -> None:
    result = plan_variant(
        VariantRequest(LLAMA, engine=EngineSettings(type="vLLM", version="0.1.0")), pool("A10")
    )
    assert result.reason == "EngineNotSupported"
    assert "0.1.0 is older than 0.20" in result.message


def test_what_the_pool_has_is_said_where_it_lacks_what_is_asked_for() -> None:
    there = pool("A10", "A100-80G")
    assert plan_variant(on("a100-80g"), there).message == "the pool has no a100-80g: write A100-80G"
    assert plan_variant(on("H100"), there).message == "the pool has no H100, only A10, A100-80G"


def test_as_many_replicas_as_there_is_room_for() -> None:
    three = PoolView((group("A10", nodes=2, more=1), group("T4", nodes=1)))
    result = plan_variant(on("A10", "T4", replicas=5), three)
    assert result.plan is not None
    assert (result.plan.accelerator, result.short, result.fits, result.retryable) == ("A10", 2, False, True)
    assert (result.reason, result.message) == (
        "AcceleratorsNotFree",
        "3 of 5 replicas fit on A10: the others wait for room",
    )
    # All on a less preferred one is better than some on the preferred one.
    roomy = PoolView((group("A10", nodes=2), group("A100-80G", nodes=5)))
    whole = plan_variant(on("A10", "A100-80G", replicas=5), roomy)
    assert whole.plan is not None
    assert (whole.plan.accelerator, whole.short) == ("A100-80G", 0)
    results = plan_all({"a": on("A10", replicas=5), "b": on("A10")}, three)
    assert (results["a"].short, results["b"].plan) == (2, None)
