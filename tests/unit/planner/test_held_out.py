"""The planner against boots that none of its constants was fitted to: other models, shares and settings."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
from tests.unit.planner.measured import HELD_OUT, planned

from modelfleet_operator.planner import VariantPlan
from modelfleet_operator.planner.on_gpus import CUDA_CONTEXT_GIB
from modelfleet_operator.planner.types import GIB

ROWS: list[dict[str, Any]] = HELD_OUT["rows"]
UNSEEN = [row for row in ROWS if not row["seen"]]
LOADED: list[dict[str, Any]] = [*ROWS, *HELD_OUT["weights"]]


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def _error(row: dict[str, Any]) -> float:
    tokens: int = row["measured"]["kvCacheTokens"]
    return planned(row).kv_cache_tokens / tokens - 1


@pytest.mark.parametrize("row", ROWS, ids=_names(ROWS))
def test_what_is_planned_starts(row: dict[str, Any]) -> None:
    """vLLM refuses to start where one request of the planned context exceeds the cache that it has."""
    plan, measured = planned(row), row["measured"]
    assert plan.kv_cache_gib <= measured["kvCacheGiB"]
    assert plan.memory
    assert plan.max_model_len
    assert plan.memory.layout.request_bytes(plan.max_model_len) <= measured["kvCacheGiB"] * GIB


@pytest.mark.parametrize("row", ROWS, ids=_names(ROWS))
def test_tokens_are_never_more_than_there_are_and_at_most_8_percent_less(row: dict[str, Any]) -> None:
    assert -0.08 <= _error(row) <= 0


def test_most_of_the_unseen_are_close() -> None:
    assert median(_error(row) for row in UNSEEN) > -0.025


@pytest.mark.parametrize("row", LOADED, ids=_names(LOADED))
def test_weights_within_2_and_a_half_percent(row: dict[str, Any]) -> None:
    assert planned(row).weights_gib == pytest.approx(row["measured"]["weightsGiB"], rel=0.025)


@pytest.mark.parametrize("row", ROWS, ids=_names(ROWS))
def test_tokens_follow_from_the_measured_memory(row: dict[str, Any]) -> None:
    """The layout itself has no error: states, latents, windows, cross attention are laid out as by vLLM."""
    plan = planned(row)
    assert plan.memory
    held = plan.memory.layout.tokens(row["measured"]["kvCacheGiB"] * GIB, _booted(row, plan))
    assert held == pytest.approx(row["measured"]["kvCacheTokens"], rel=2e-3)


def _booted(row: dict[str, Any], plan: VariantPlan) -> int:
    context: int = row["booted"]["maxModelLen"] or plan.max_model_len
    return context


@pytest.mark.parametrize("row", ROWS, ids=_names(ROWS))
def test_a_process_holds_no_more_than_is_reserved_for_it(row: dict[str, Any]) -> None:
    """Its share, its CUDA context, and what the engine does not count."""
    plan = planned(row)
    assert plan.memory
    share = HELD_OUT["memoryGiB"] * row["memoryShare"]
    beside = CUDA_CONTEXT_GIB + plan.memory.overhead.unreserved / GIB
    assert row["measured"]["processGiB"] <= share + beside


@pytest.mark.parametrize("row", ROWS, ids=_names(ROWS))
def test_the_runner_is_the_one_that_ran(row: dict[str, Any]) -> None:
    plan = planned(row)
    assert plan.memory
    uncounted = row["version"] == "0.26.0" and plan.memory.overhead.unreserved > 0
    assert uncounted == (row["measured"]["runner"] == "v2" and row["version"] == "0.26.0")


def test_some_stayed_unseen() -> None:
    """Rows that corrected something are no proof of it: enough must be left that changed nothing."""
    assert len(UNSEEN) >= 7
    assert not any(row["corrected"] for row in UNSEEN)


def test_uncompiled_quantized_activations_take_room() -> None:
    """An 8-bit copy of the MLP's product, for each token of the largest step."""
    quantized = next(row for row in ROWS if row["name"] == "fp8-block")
    plain = {**quantized, "model": "Qwen/Qwen3-8B", "quantization": "None"}
    more, less = planned(quantized).memory, planned(plain).memory
    assert more
    assert less
    assert more.overhead.activations - less.overhead.activations == 8192 * 12288


def test_the_allowance_stands_in_the_sum() -> None:
    foot = planned(ROWS[0]).memory
    assert foot
    total = foot.weights + foot.overhead.total + foot.allowance + foot.kv_cache
    assert total == pytest.approx(foot.memory * foot.share)
    assert any(line.endswith("for what this sum does not know") for line in foot.lines())
