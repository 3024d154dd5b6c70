"""Room for LoRA adapters: the rank is theirs, where it can be known."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.planner.measured import config, pool

from modelfleet_operator.api import ModelDeployment, parse_object
from modelfleet_operator.planner import AdapterFacts, ModelUnavailable, VariantPlan, plan_variant
from modelfleet_operator.planner.adapters import RANKS, adapter_key, choose_rank, step_of
from modelfleet_operator.planner.inputs import Facts, sources_of, variant_request
from modelfleet_operator.reconcile.applications import revision
from modelfleet_serving.contract import Adapter

ONE = [Adapter(name="one", source="hf://o/one")]
TWO = [*ONE, Adapter(name="two", source="hf://o/two")]
AWAY = ModelUnavailable("Unreachable", "the hub can't be reached", retryable=True)
MODEL = "hf://o/n"


def ranks(**known: int | ModelUnavailable) -> dict[str, AdapterFacts | ModelUnavailable]:
    return {
        adapter_key(f"hf://o/{name}"): AdapterFacts(found) if isinstance(found, int) else found
        for name, found in known.items()
    }


@pytest.mark.parametrize(
    ("known", "expected"), [(4, 16), (16, 16), (17, 32), (64, 64), (300, 320), (512, 512), (600, 512)]
)
def test_the_rank_is_the_highest_adapters_in_steps(known: int, expected: int) -> None:
    choice = choose_rank(TWO, ranks(one=8, two=known))
    assert choice.rank == expected
    assert choice.rank in RANKS
    assert bool(choice.notes) is (known > 512)


def test_every_step_holds_its_ranks() -> None:
    assert all(step_of(rank) >= rank for rank in range(1, 513))
    assert all(step_of(step) == step for step in RANKS)


def test_what_can_not_be_read_is_said_and_reckoned_with_the_default() -> None:
    choice = choose_rank(TWO, ranks(one=AWAY, two=32))
    assert choice.rank == 32
    (note,) = choice.notes
    assert note.startswith(
        "adapter one: its rank can't be read (Unreachable: the hub can't be reached), so 16"
    )
    assert choose_rank(ONE, ranks(one=AWAY)).rank == 16
    assert choose_rank(ONE, {}).unread == ("one",)


def test_what_the_user_wrote_stays_and_what_exceeds_it_is_said() -> None:
    choice = choose_rank(TWO, ranks(one=64, two=AWAY), asked=32)
    assert choice.rank == 32
    (note,) = choice.notes
    assert "adapter one has rank 64, above engine.lora.maxRank 32" in note


def test_it_does_not_shrink_while_an_engine_runs() -> None:
    assert choose_rank(ONE, ranks(one=8), running=64).rank == 64
    assert choose_rank(ONE, ranks(one=128), running=64).rank == 128
    assert choose_rank(ONE, ranks(one=8), running=64, asked=16).rank == 16


def deployment(*adapters: str, **engine: Any) -> ModelDeployment:
    found = parse_object(
        {
            "apiVersion": "modelfleet.io/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": "m"},
            "spec": {
                "model": {"source": MODEL},
                "engine": {"maxModelLen": 4096, **engine},
                "variants": [{"name": "a"}],
                "adapters": [{"name": name, "source": f"hf://o/{name}"} for name in adapters],
            },
        }
    )
    assert isinstance(found, ModelDeployment)
    return found


def planned(resource: ModelDeployment, facts: Facts, **running: Any) -> VariantPlan:
    facts = {MODEL: config("Qwen/Qwen2.5-7B-Instruct").facts, **facts}
    (variant,) = resource.spec.variants
    plan = plan_variant(variant_request(resource, variant, facts, **running), pool("A100-80G")).plan
    assert plan is not None
    return plan


def test_the_planner_counts_the_memory_of_that_rank() -> None:
    small, large = (planned(deployment("one"), ranks(one=rank)) for rank in (16, 256))
    assert small.engine.lora is not None
    assert large.engine.lora is not None
    assert (small.engine.lora.max_rank, large.engine.lora.max_rank) == (16, 256)
    # 4 slots of rank 256 - 16 more beside each linear layer, of two bytes: some 5 GiB for 7B.
    assert 3 < large.weights_gib - small.weights_gib < 8
    assert large.kv_cache_tokens < small.kv_cache_tokens
    asked = planned(deployment("one", lora={"maxRank": 256}), ranks(one=16))
    assert asked.weights_gib == large.weights_gib


def test_a_higher_rank_is_another_engine_and_the_default_is_none() -> None:
    resource = deployment("one")
    (variant,) = resource.spec.variants
    found = {
        rank: revision(resource, variant, planned(resource, ranks(one=rank))) for rank in (4, 16, 64, 60)
    }
    assert found[4] == found[16]
    assert found[64] == found[60]
    assert found[16] != found[64]
    held = revision(resource, variant, planned(resource, ranks(one=4), lora_rank=64, current="A100-80G"))
    assert held == found[64], "an adapter that goes restarts nothing"


def test_notes_reach_the_plan() -> None:
    assert any("its rank can't be read" in note for note in planned(deployment("one"), ranks(one=AWAY)).notes)
    assert not planned(deployment(), {}).notes


def test_facts_of_adapters_are_asked_for_where_an_engine_needs_them() -> None:
    assert sources_of(deployment("one")) == {MODEL, adapter_key("hf://o/one")}
    assert sources_of(deployment("one", type="Simulator")) == set()
    (variant,) = (resource := deployment("one")).spec.variants
    facts = {MODEL: config("Qwen/Qwen2.5-7B-Instruct").facts}
    assert variant_request(resource, variant, facts).reading
    assert not variant_request(resource, variant, facts, lora_rank=16, current="A10").reading
