from __future__ import annotations

import base64
import json
import mmap
import random
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.router_policies import prefix_simulation as simulation
from tests.unit.router_policies.prefix_simulation import Arrival, Choose, Outcome
from tests.unit.router_policies.replicas import Fleet

from modelfleet_serving.router.affinity import (
    Fingerprint,
    LoadView,
    PrefixAffinity,
    PrefixTable,
    fingerprint,
    readable_bytes,
    seed_of,
    unread_kib,
)
from modelfleet_serving.router.choice import Group, Pool, Selector

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=2000)}
    ),
    min_size=1,
    max_size=6,
)


def prompt_of(data: bytes, seed: int = 0) -> Fingerprint:
    found = fingerprint(data, seed)
    assert found is not None
    return found


# --- Fingerprints ---


@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 2}])
@given(MESSAGES, MESSAGES)
@settings(max_examples=40)
def test_a_continued_conversation_begins_with_the_hashes_of_the_last_turn(
    layout: dict[str, object], first: list[dict[str, str]], more: list[dict[str, str]]
) -> None:
    before = fingerprint(json.dumps(first, **layout).encode())  # type: ignore[arg-type]
    after = fingerprint(json.dumps(first + more, **layout).encode())  # type: ignore[arg-type]
    if before is not None:
        assert after is not None
        assert after.hashes[: len(before.hashes)] == before.hashes
        assert after.size > before.size


@given(st.binary(min_size=600, max_size=20_000), st.integers(0, 2**64 - 1), st.data())
def test_a_changed_byte_changes_its_block_and_all_later_ones(
    data: bytes, seed: int, draw: st.DataObject
) -> None:
    original = prompt_of(data + b"]", seed)
    position = draw.draw(st.integers(0, original.end(len(original.hashes) - 1) - 1))
    changed = prompt_of(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :] + b"]", seed)
    for block, (one, other) in enumerate(zip(original.hashes, changed.hashes, strict=True)):
        assert (one == other) == (original.end(block) <= position)


def test_completion_prompt_continues_too() -> None:
    text = "a" * 3000
    before, after = prompt_of(json.dumps(text).encode()), prompt_of(json.dumps(text + "b" * 900).encode())
    assert after.hashes[: len(before.hashes)] == before.hashes


def test_short_prompts_have_no_fingerprint() -> None:
    assert fingerprint(b'[{"role":"user","content":"hi"}]') is None
    assert fingerprint(b"") is None


def test_tenant_model_and_adapter_share_nothing() -> None:
    data = b"x" * 2000
    seeds = [
        seed_of("m", "v", "", ""),
        seed_of("m", "v", "lora", ""),
        seed_of("m", "v", "", "salt"),
        seed_of("mv", "", "", ""),
    ]
    assert len({prompt_of(data, seed).hashes[0] for seed in seeds}) == len(seeds)


def test_tools_count_as_part_of_the_prompt_in_front_of_it() -> None:
    question = b'[{"role":"user","content":"hi"}]'
    tools = b"[" + b"t" * 4000 + b"]"
    one, other = (
        fingerprint(question, 0, (tools,)),
        fingerprint(b'[{"role":"user","content":"bye"}]', 0, (tools,)),
    )
    assert one is not None
    assert other is not None
    assert one.hashes == other.hashes
    assert one.end(0) == len(tools)
    changed = fingerprint(question, 0, (tools + b" ",))
    assert changed is not None
    assert changed.hashes != one.hashes


def test_a_raw_message_list_of_a_parsed_body_is_taken_without_a_copy() -> None:
    class Body(msgspec.Struct):
        messages: msgspec.Raw

    body = (
        b'{"model": "m", "messages": [' + b'{"role": "user", "content": "%s"}' % (b"y" * 5000) + b'], "n": 1}'
    )
    raw = msgspec.json.decode(body, type=Body).messages
    assert prompt_of(raw).hashes == prompt_of(bytes(raw)).hashes  # type: ignore[arg-type]


def test_blocks_of_a_huge_prompt_are_few() -> None:
    assert len(prompt_of(b"x" * 220_000).hashes) < 30
    assert len(prompt_of(b"x" * 64_000_000).hashes) < 64


# --- What an engine has to read ---


@pytest.mark.parametrize(
    "words", [["word "], ["日本語の文章です"], ["x=1;\n", "y=[2]\n"], ["café ", "naïve "]]
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_text_counts_in_full(words: list[str], ascii_only: bool) -> None:
    text = "".join(random.Random(3).choices(words, k=8_000))
    body = json.dumps({"prompt": text}, ensure_ascii=ascii_only).encode()
    assert readable_bytes(body) == len(body) > 30_000


@pytest.mark.parametrize("size", [100_000, 1_000_000, 20_000_000])
def test_an_image_counts_for_little(size: int) -> None:
    image = base64.b64encode(random.Random(1).randbytes(size * 3 // 4)).decode()
    question = "what is on this picture? " * 400
    content = [
        {"type": "text", "text": question},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    ]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert len(question) * 0.5 < readable_bytes(body) < len(question) + 0.1 * size


def test_what_is_held_is_not_read_again() -> None:
    body = b"word " * 8_000
    assert unread_kib(readable_bytes(body)) == 40
    assert unread_kib(readable_bytes(body), size=1000, held=750) == 10
    assert unread_kib(readable_bytes(body), size=1000, held=1000) == 0


# --- Table ---


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 65535)), max_size=200))
def test_table_tells_only_what_it_was_told(entries: list[tuple[int, int]]) -> None:
    table = PrefixTable(size=64 * 16)
    told: dict[int, set[int]] = {}
    for value, code in entries:
        known = code in table.holders(value)
        assert bool(table.add(value, code)) == known
        told.setdefault(value >> 16, set()).add(code)
        assert table.holders(value)[0] == code
    for value, _ in entries:
        assert set(table.holders(value)) <= told[value >> 16]


def test_table_forgets_what_was_used_longest_ago() -> None:
    table = PrefixTable(size=64)
    for value in range(8):
        table.add(value << 16, 1)
    table.add(0, 1)
    table.add(99 << 16, 1)
    assert table.holders(0) == [1]
    assert not table.holders(1 << 16)


def test_workers_see_one_another_through_shared_memory() -> None:
    with mmap.mmap(-1, 64 * 1024) as memory:
        one, other = PrefixTable(memory), PrefixTable(memory)
        one.add(12345, 7)
        assert other.holders(12345) == [7]
        del one, other


@pytest.mark.parametrize("size", [0, 63, 96, 1000])
def test_table_refuses_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        PrefixTable(size=size)


# --- Choice ---


def setup(count: int, seed: int = 0, **margins: float) -> tuple[Fleet, Pool, Selector]:
    fleet = Fleet(count)
    load = LoadView(fleet.total, fleet.pending_total)
    rng = random.Random(seed)
    return fleet, Pool(fleet.replicas), Selector(load, rng, PrefixAffinity(load, rng, **margins))


def test_a_conversation_stays_until_its_replica_is_too_busy_and_the_next_one_holds_it_too() -> None:
    fleet, pool, selector = setup(4)
    data = random.Random(1).randbytes(20_000)
    first = selector.pick(pool, prompt=prompt_of(data))
    assert first is not None
    fleet.loads[first.row] = 40
    longer = prompt_of(data + b"more" * 100)
    assert selector.pick(pool, prompt=longer) is first
    assert longer.held > 18_000
    fleet.loads[first.row] = 50
    second = selector.pick(pool, prompt=prompt_of(data))
    assert second is not None
    assert second is not first
    # Both hold it now: the less busy one is taken, without any margin between them.
    fleet.loads[first.row], fleet.loads[second.row] = 25, 24
    assert selector.pick(pool, prompt=prompt_of(data)) is second
    fleet.loads[second.row] = 26
    assert selector.pick(pool, prompt=prompt_of(data)) is first


def test_a_small_common_beginning_is_not_worth_a_queue() -> None:
    fleet, pool, selector = setup(4)
    common = random.Random(2).randbytes(600)
    first = selector.pick(pool, prompt=prompt_of(common + random.Random(3).randbytes(30_000)))
    assert first is not None
    fleet.loads[first.row] = 3
    assert selector.pick(pool, prompt=prompt_of(common + random.Random(4).randbytes(30_000))) is not first


def test_a_holder_of_less_takes_over_when_the_holder_of_all_is_busy() -> None:
    fleet, pool, selector = setup(4, home=0.0)
    data = random.Random(5).randbytes(40_000)
    part = selector.pick(pool, prompt=prompt_of(data[:30_000]))
    assert part is not None
    fleet.loads[part.row] = 100
    whole = selector.pick(pool, prompt=prompt_of(data))
    assert whole is not None
    assert whole is not part
    fleet.loads = [0] * 4
    fleet.loads[whole.row] = 40
    assert selector.pick(pool, prompt=prompt_of(data)) is part


@given(st.lists(st.integers(0, 20), min_size=2, max_size=16), st.integers(0, 2**32))
@settings(max_examples=50)
def test_independent_routers_place_a_new_prompt_alike(loads: list[int], seed: int) -> None:
    data = random.Random(seed).randbytes(5_000)
    chosen = set()
    for router in range(3):
        fleet, pool, selector = setup(len(loads), router)
        fleet.loads = list(loads)
        found = selector.pick(pool, prompt=prompt_of(data))
        assert found is not None
        assert fleet.total(found.row) <= min(loads) + 2
        chosen.add(found.id)
    assert len(chosen) == 1


def test_many_replicas_are_sampled_and_the_holder_is_still_found() -> None:
    fleet, pool, selector = setup(200)
    fleet.loads = [5] * 200
    data = random.Random(6).randbytes(20_000)
    first = selector.pick(pool, prompt=prompt_of(data))
    assert first is not None
    assert all(selector.pick(pool, prompt=prompt_of(data + b"x" * n)) is first for n in range(0, 3000, 100))


def test_a_replica_that_left_is_not_chosen_for_what_it_held() -> None:
    _, pool, selector = setup(3)
    data = random.Random(7).randbytes(8_000)
    first = selector.pick(pool, prompt=prompt_of(data))
    assert first is not None
    first.limit = 0
    pool.refresh()
    assert selector.pick(pool, prompt=prompt_of(data)) is not first


def test_group_walks_every_member_once() -> None:
    group = Group(Fleet(9).replicas)
    assert sorted(group.walk(0)) == sorted(group.walk(2**64 - 1)) == list(range(9))


# --- On simulated engines ---

ENGINES = 8


@cache
def trace(name: str) -> list[Arrival]:
    if name == "prefix":
        return simulation.shared_prefix(rate=45, seconds=45)
    if name == "turns":
        return simulation.multi_turn(rate=7, seconds=45)
    if name == "unshared":
        return simulation.unshared(rate=26, seconds=60)
    return simulation.popular(rate=60, seconds=25)


@cache
def outcome(name: str, policy: str) -> Outcome:
    policies: dict[str, Choose] = {
        "random": simulation.random_choice(ENGINES),
        "least": simulation.least_outstanding(ENGINES),
        "radix": simulation.radix_tree(ENGINES),
        "ours": simulation.prefix_affinity(ENGINES),
        "ours, uncounted": simulation.prefix_affinity(ENGINES, pending_counts=False),
        "4 workers": simulation.prefix_affinity(ENGINES, routers=4),
        "4 hosts": simulation.prefix_affinity(ENGINES, routers=4, shared=False, home=16.0),
        "4 hosts, alone": simulation.prefix_affinity(ENGINES, routers=4, shared=False, home=0.0),
    }
    return simulation.simulate(trace(name), policies[policy], ENGINES)


def test_shared_prefixes_hit_as_often_as_one_radix_tree_and_far_more_than_by_load() -> None:
    ours, radix = outcome("prefix", "ours"), outcome("prefix", "radix")
    assert ours.hit_rate > radix.hit_rate - 0.01
    assert ours.quantile(0.99) < 1.1 * radix.quantile(0.99)
    for other in ("least", "random"):
        assert ours.hit_rate > 3 * outcome("prefix", other).hit_rate
        assert ours.quantile(0.5) < 0.1 * outcome("prefix", other).quantile(0.5)


def test_conversations_hit_more_often_than_with_one_radix_tree_and_wait_less() -> None:
    ours, radix = outcome("turns", "ours"), outcome("turns", "radix")
    assert ours.hit_rate > radix.hit_rate + 0.1
    assert ours.quantile(0.99) < 0.2 * radix.quantile(0.99)
    assert ours.hit_rate > 2 * outcome("turns", "least").hit_rate


def test_without_shared_prefixes_affinity_loses_nothing() -> None:
    ours, least = outcome("unshared", "ours"), outcome("unshared", "least")
    assert ours.quantile(0.5) < least.quantile(0.5)
    assert ours.quantile(0.99) < least.quantile(0.99)
    assert ours.quantile(0.99) < 1.1 * outcome("unshared", "radix").quantile(0.99)
    # Even where nobody counts pending prompts.
    assert outcome("unshared", "ours, uncounted").quantile(0.99) < 1.2 * least.quantile(0.99)


def test_a_popular_system_prompt_is_spread() -> None:
    ours, radix = outcome("popular", "ours"), outcome("popular", "radix")
    assert ours.hit_rate > 0.85
    assert ours.quantile(0.99) < 0.6 * radix.quantile(0.99)
    assert ours.peak < 0.6 * radix.peak


@pytest.mark.parametrize("name", ["prefix", "turns"])
def test_workers_that_share_the_table_decide_as_one(name: str) -> None:
    assert outcome(name, "4 workers").hit_rate == pytest.approx(outcome(name, "ours").hit_rate, abs=0.01)


@pytest.mark.parametrize("name", ["prefix", "turns"])
def test_hosts_that_share_nothing_agree_on_homes(name: str) -> None:
    agreed, alone = outcome(name, "4 hosts"), outcome(name, "4 hosts, alone")
    assert agreed.hit_rate > alone.hit_rate + 0.1
    assert agreed.hit_rate > 2 * outcome(name, "least").hit_rate
