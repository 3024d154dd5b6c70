"""The planner against vLLM on a real GPU: 19 boots with dummy weights and real shapes."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.planner.measured import MEASURED, planned

ROWS: list[dict[str, Any]] = MEASURED["rows"]


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_weights_within_2_percent(row: dict[str, Any]) -> None:
    measured = row["measured"]["weightsGiB"]
    assert planned(row).weights_gib == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_kv_cache_is_never_more_than_there_is_and_at_most_5_percent_less(row: dict[str, Any]) -> None:
    plan, measured = planned(row), row["measured"]
    assert 0.95 * measured["kvCacheGiB"] <= plan.kv_cache_gib <= measured["kvCacheGiB"]
    assert 0.95 * measured["kvCacheTokens"] <= plan.kv_cache_tokens <= measured["kvCacheTokens"]


def test_tokens_follow_exactly_from_the_measured_memory() -> None:
    """The layout itself has no error: from the engine's own GiB, tokens agree to a block or two."""
    for row in ROWS:
        plan = planned(row)
        measured = row["measured"]
        per_gib = plan.kv_cache_tokens / plan.kv_cache_gib
        assert per_gib * measured["kvCacheGiB"] == pytest.approx(measured["kvCacheTokens"], rel=2e-3), row[
            "name"
        ]


def test_the_pairs_that_matter_are_covered() -> None:
    names = {row["name"] for row in ROWS}
    wanted = {"llama8b-bf16", "llama8b-fp8", "qwen7b-awq", "vl2-small", "qwen3-0.6b", "llama8b-lora"}
    assert wanted <= names
