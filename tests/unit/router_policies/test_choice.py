from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.router_policies.replicas import FakeReplica, Fleet

from modelfleet_serving.router.affinity import LoadView, fingerprint
from modelfleet_serving.router.choice import Pool, Selector, Split, VariantPlan, session_key

WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any)


def make_selector(fleet: Fleet, seed: int = 0, *, pending: bool = False) -> Selector:
    return Selector(LoadView(fleet.total, fleet.pending_total if pending else None), random.Random(seed))


# --- Weights ---


@given(WEIGHTS, st.floats(0, 1, exclude_max=True), st.integers(50, 400))
def test_split_keeps_every_share_at_every_time(weights: list[int], start: float, draws: int) -> None:
    split = Split(weights, start)
    counts = Counter()
    for number in range(1, draws + 1):
        counts[split.draw()] += 1
        for index, weight in enumerate(weights):
            # A random draw would be off by sqrt(n): 20 at 400.
            assert abs(counts[index] - number * weight / sum(weights)) < 4


@given(WEIGHTS, st.floats(0, 1, exclude_max=True))
def test_split_never_draws_a_weight_of_zero(weights: list[int], start: float) -> None:
    split = Split(weights, start)
    keys = [0, 1, 2**63, 2**64 - 1]
    assert all(weights[split.draw(key)] > 0 for key in keys)
    assert all(weights[split.draw()] > 0 for _ in range(100))


def test_split_is_right_over_many_workers_that_draw_once() -> None:
    rng = random.Random(5)
    counts = Counter(Split([20, 80], rng.random()).draw() for _ in range(4000))
    assert counts[0] / 4000 == pytest.approx(0.2, abs=0.03)


def test_a_session_keeps_its_index_and_sessions_are_split_by_weight() -> None:
    split = Split([30, 70], 0.5)
    keys = [session_key(b"session-%d" % number) for number in range(2000)]
    first = [split.draw(key) for key in keys]
    split.draw()
    assert [split.draw(key) for key in keys] == first
    assert first.count(0) / 2000 == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_split_refuses_weights_that_mean_nothing(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Split(weights, 0.0)


# --- Variants ---

VARIANTS = {"bf16": "BF16", "awq": "AWQ", "fp8": "FP8"}


def test_chosen_variant_comes_first_then_fallbacks_in_their_order() -> None:
    plan = VariantPlan(VARIANTS, {"awq": 100}, ["fp8", "awq", "gone", "bf16", "fp8"], 0.1)
    assert plan.order() == ("AWQ", "FP8", "BF16")


def test_without_fallback_there_is_only_the_chosen_one() -> None:
    assert VariantPlan(VARIANTS, {"awq": 1}, [], 0.1).order() == ("AWQ",)


def test_pin_takes_that_variant_alone_even_without_weight() -> None:
    plan = VariantPlan(VARIANTS, {"awq": 100}, ["awq", "bf16"], 0.1)
    assert plan.order("bf16") == ("BF16",)
    assert plan.order("gone") == ()


def test_weights_split_the_first_choice() -> None:
    plan = VariantPlan(VARIANTS, {"bf16": 20, "awq": 80, "fp8": 0, "gone": 50}, [], 0.3)
    counts = Counter(plan.order()[0] for _ in range(1000))
    assert counts["BF16"] == pytest.approx(200, abs=3)
    assert counts["AWQ"] == pytest.approx(800, abs=3)


def test_without_weights_all_variants_are_equal() -> None:
    for weights in ({}, {"bf16": 0}):
        plan = VariantPlan(VARIANTS, weights, [], 0.3)
        counts = Counter(plan.order()[0] for _ in range(300))
        assert all(count == pytest.approx(100, abs=3) for count in counts.values())
        assert len(counts) == 3


def test_a_model_without_variants_has_no_order() -> None:
    assert VariantPlan({}, {}, [], 0.3).order() == ()


# --- Replicas ---


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_a_replica_with_room_is_always_found_and_a_full_one_never(
    states: list[tuple[int, int]], seed: int, with_prompt: bool
) -> None:
    fleet = Fleet(len(states), [load for load, _ in states])
    for replica, (_, limit) in zip(fleet.replicas, states, strict=True):
        replica.limit = limit
    selector = make_selector(fleet, seed)
    prompt = fingerprint(b"x" * 3000) if with_prompt else None
    found = selector.pick(Pool(fleet.replicas), prompt=prompt)
    room = {replica.id for replica in fleet.replicas if fleet.total(replica.row) < replica.limit}
    assert (found is None) == (not room)
    assert found is None or found.id in room
    by_session = selector.pick(Pool(fleet.replicas), session=seed)
    assert (by_session is None) == (not room)
    assert by_session is None or by_session.id in room


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 2**32))
def test_of_few_replicas_the_least_loaded_gets_the_request(loads: list[int], seed: int) -> None:
    fleet = Fleet(len(loads), loads)
    found = make_selector(fleet, seed).pick(Pool(fleet.replicas))
    assert found is not None
    assert fleet.total(found.row) == min(loads)


def test_of_many_replicas_two_random_ones_keep_the_load_flat() -> None:
    fleet = Fleet(64)
    selector, pool = make_selector(fleet), Pool(fleet.replicas)
    for _ in range(64 * 20):
        found = selector.pick(pool)
        assert found is not None
        fleet.loads[found.row] += 1
    assert max(fleet.loads) - min(fleet.loads) <= 5  # random placement: about 25


def test_equally_loaded_replicas_take_turns() -> None:
    fleet = Fleet(4)
    selector, pool = make_selector(fleet), Pool(fleet.replicas)
    assert len({selector.pick(pool).id for _ in range(100)}) == 4  # type: ignore[union-attr]


def test_bigger_replicas_take_more() -> None:
    fleet = Fleet(2)
    fleet.replicas[0].capacity = fleet.replicas[0].limit = 8
    fleet.replicas[1].capacity = fleet.replicas[1].limit = 32
    selector, pool = make_selector(fleet), Pool(fleet.replicas)
    for _ in range(20):
        found = selector.pick(pool)
        assert found is not None
        fleet.loads[found.row] += 1
    assert fleet.loads == [4, 16]


def test_one_on_probation_gets_a_single_request() -> None:
    fleet = Fleet(3, [0, 5, 5])
    for replica in fleet.replicas:
        replica.capacity = replica.limit = 16
    fleet.replicas[0].limit = 1
    selector, pool = make_selector(fleet), Pool(fleet.replicas)
    found = selector.pick(pool)
    assert found is fleet.replicas[0]
    fleet.loads[0] += 1
    assert selector.pick(pool) is not fleet.replicas[0]


def test_prompts_that_wait_for_their_prefill_count_as_load() -> None:
    fleet = Fleet(2, [3, 1], [0, 64])
    assert make_selector(fleet, pending=True).pick(Pool(fleet.replicas)) is fleet.replicas[0]
    assert make_selector(fleet).pick(Pool(fleet.replicas)) is fleet.replicas[1]


def test_failed_replicas_are_left_out() -> None:
    fleet = Fleet(3, [0, 0, 9])
    selector, pool = make_selector(fleet), Pool(fleet.replicas)
    assert selector.pick(pool, exclude=fleet.replicas[:2]) is fleet.replicas[2]
    assert selector.pick(pool, exclude=fleet.replicas) is None


def test_pool_follows_a_changed_limit_after_refresh() -> None:
    fleet = Fleet(1)
    pool = Pool(fleet.replicas)
    fleet.replicas[0].limit = 0
    pool.refresh()
    assert not pool.usable
    assert make_selector(fleet).pick(pool) is None


# --- Revisions ---


def rollout(canary: int) -> tuple[Fleet, Pool[FakeReplica], Selector]:
    fleet = Fleet(5)
    for replica in fleet.replicas:
        replica.revision = "old"
    fleet.replicas[4].revision = "new"
    return fleet, Pool(fleet.replicas, {"old": 100 - canary, "new": canary}, 0.2), make_selector(fleet)


def test_canary_gets_exactly_its_share() -> None:
    _, pool, selector = rollout(5)
    picks = Counter(selector.pick(pool).revision for _ in range(1000))  # type: ignore[union-attr]
    assert picks["new"] == pytest.approx(50, abs=3)


def test_shares_hold_though_the_pool_is_refreshed_all_the_time() -> None:
    _, pool, selector = rollout(20)
    picks: Counter[str] = Counter()
    for _ in range(500):
        pool.refresh()
        picks[selector.pick(pool).revision] += 1  # type: ignore[union-attr]
    assert picks["new"] == pytest.approx(100, abs=5)


def test_revision_without_weight_gets_nothing_even_when_the_other_is_gone() -> None:
    fleet, pool, selector = rollout(0)
    for replica in fleet.replicas[:4]:
        replica.limit = 0
    pool.refresh()
    assert selector.pick(pool) is None


def test_other_revision_takes_over_when_one_is_full() -> None:
    fleet, pool, selector = rollout(50)
    fleet.replicas[4].limit = 1
    pool.refresh()
    fleet.loads[4] = 1
    assert {selector.pick(pool).revision for _ in range(20)} == {"old"}  # type: ignore[union-attr]


def test_sessions_are_split_between_revisions_within_each_variant() -> None:
    plan = VariantPlan({"a": "a", "b": "b"}, {"a": 50, "b": 50}, [], 0.0)
    _, pool, selector = rollout(50)
    keys = [session_key(b"%d" % number) for number in range(1000)]
    keys = [key for key in keys if plan.order(session=key) == ("a",)]
    share = Counter(selector.pick(pool, session=key).revision for key in keys)  # type: ignore[union-attr]
    assert share["new"] / len(keys) == pytest.approx(0.5, abs=0.08)


# --- Adapters ---


def test_only_replicas_with_the_adapter_count_where_they_say_what_they_have() -> None:
    fleet = Fleet(4, [0, 0, 7, 9])
    fleet.replicas[2].adapters = fleet.replicas[3].adapters = frozenset({"sql"})
    selector, pool = make_selector(fleet), Pool(fleet.replicas)
    assert selector.pick(pool, adapter="sql") is fleet.replicas[2]
    assert selector.pick(pool, adapter="unknown") is None
    assert selector.pick(pool) in fleet.replicas[:2]


def test_any_replica_takes_an_adapter_where_none_says_what_it_has() -> None:
    fleet = Fleet(2)
    assert make_selector(fleet).pick(Pool(fleet.replicas), adapter="sql") is not None


# --- Sessions ---


def test_a_session_stays_while_its_replica_is_within_the_margin() -> None:
    fleet = Fleet(8)
    pool = Pool(fleet.replicas)
    key = session_key(b"conversation")
    homes = {make_selector(fleet, seed).pick(pool, session=key).id for seed in range(20)}  # type: ignore[union-attr]
    assert len(homes) == 1  # every worker agrees
    home = make_selector(fleet).pick(pool, session=key)
    assert home is not None
    fleet.loads[home.row] = 30
    assert make_selector(fleet).pick(pool, session=key) is home
    fleet.loads[home.row] = 40
    assert make_selector(fleet).pick(pool, session=key) is not home


def test_sessions_are_spread_and_few_move_when_a_replica_comes() -> None:
    small, big = Fleet(8), Fleet(9)
    keys = [session_key(b"s%d" % number) for number in range(2000)]
    first, few = make_selector(small), Pool(small.replicas)
    before = [first.pick(few, session=key).id for key in keys]  # type: ignore[union-attr]
    pool, selector = Pool(big.replicas), make_selector(big)
    after = [selector.pick(pool, session=key).id for key in keys]  # type: ignore[union-attr]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"replica-8"}
    assert len(moved) / 2000 < 0.2
    assert max(Counter(before).values()) < 2 * 2000 / 8
