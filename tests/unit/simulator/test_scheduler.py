from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfleet_serving.simulator.blocks import BlockPool, block_hashes
from modelfleet_serving.simulator.scheduler import Limits, Scheduler, Sequence, Speed

SPEED = Speed(prefill_base=0.010, prefill_rate=1000, decode_base=0.020, decode_per_sequence=0.001)
_fresh = count(1)


def limits(**changes: object) -> Limits:
    fields = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "kv_blocks": 1000, "max_loras": 2}
    return Limits(**(fields | changes))  # type: ignore[arg-type]


def prompt(length: int) -> list[int]:
    """Tokens that no other prompt has."""
    first = next(_fresh) * 1_000_000
    return list(range(first, first + length))


def run(scheduler: Scheduler, steps: int = 10_000) -> float:
    """Steps until nothing moves; returns the simulated time."""
    now = 0.0
    for _ in range(steps):
        step = scheduler.step(now)
        if not step.seconds:
            return now
        now += step.seconds
    raise AssertionError("it never ends")


def test_one_request_takes_its_prefill_and_a_step_for_each_further_token() -> None:
    scheduler = Scheduler(limits(), SPEED)
    sequence = Sequence(prompt(100), 5)
    scheduler.add(sequence)
    first = scheduler.step(0.0)
    assert first.seconds == pytest.approx(0.010 + 0.100)
    assert first.outputs == [(sequence, sequence.tokens[100])]
    assert run(scheduler) == pytest.approx(4 * 0.021)
    assert sequence.finished
    assert sequence.generated == 5
    assert scheduler.pool.usage == 0


def test_a_batch_decodes_together() -> None:
    scheduler = Scheduler(limits(), SPEED)
    for _ in range(4):
        scheduler.add(Sequence(prompt(10), 11))
    scheduler.step(0.0)
    step = scheduler.step(0.0)
    assert step.decodes == 4
    assert step.seconds == pytest.approx(0.020 + 4 * 0.001)


def test_places_are_given_in_order_of_arrival() -> None:
    scheduler = Scheduler(limits(max_num_seqs=2), SPEED)
    sequences = [Sequence(prompt(10), 3) for _ in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.step(0.0)
    assert scheduler.running == sequences[:2]
    assert list(scheduler.waiting) == sequences[2:]
    run(scheduler)
    admitted = [sequence.admitted for sequence in sequences]
    assert admitted == sorted(admitted)
    assert all(sequence.finished for sequence in sequences)


def test_a_long_prompt_is_split_and_others_decode_meanwhile() -> None:
    scheduler = Scheduler(limits(max_num_batched_tokens=128), SPEED)
    short, long = Sequence(prompt(8), 50), Sequence(prompt(300), 2)
    scheduler.add(short)
    scheduler.step(0.0)
    scheduler.add(long)
    step = scheduler.step(0.0)
    assert (step.decodes, step.prefill_tokens) == (1, 127)
    assert long.generated == 0
    scheduler.step(0.0)
    scheduler.step(0.0)
    assert long.generated == 1
    assert short.generated == 4


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it() -> None:
    scheduler = Scheduler(limits(max_num_batched_tokens=100, chunked_prefill=False), SPEED)
    short, long = Sequence(prompt(50), 1), Sequence(prompt(90), 1)
    scheduler.add(short)
    scheduler.add(long)
    assert scheduler.step(0.0).prefill_tokens == 50
    assert scheduler.step(0.0).prefill_tokens == 90


def test_a_shared_beginning_is_computed_once() -> None:
    scheduler = Scheduler(limits(), SPEED)
    common = prompt(64)
    first, second = Sequence(common + prompt(10), 1), Sequence(common + prompt(10), 1)
    scheduler.add(first)
    run(scheduler)
    scheduler.add(second)
    step = scheduler.step(0.0)
    assert (first.cached, second.cached) == (0, 64)
    assert step.prefill_tokens == 10
    assert (scheduler.counters.cache_queries, scheduler.counters.cache_hits) == (148, 64)


def test_the_last_token_is_always_computed() -> None:
    scheduler = Scheduler(limits(), SPEED)
    tokens = prompt(64)
    scheduler.add(Sequence(list(tokens), 1))
    run(scheduler)
    again = Sequence(list(tokens), 1)
    scheduler.add(again)
    assert scheduler.step(0.0).prefill_tokens == 16
    assert again.cached == 48


def test_what_was_generated_is_cached_like_a_prompt() -> None:
    scheduler = Scheduler(limits(), SPEED)
    first = Sequence(prompt(16), 33)
    scheduler.add(first)
    run(scheduler)
    turn = Sequence(first.tokens + prompt(10), 1)
    scheduler.add(turn)
    scheduler.step(0.0)
    assert turn.cached == 48


def test_adapters_have_caches_of_their_own() -> None:
    scheduler = Scheduler(limits(), SPEED)
    tokens = prompt(64)
    for adapter in ("", "a", "b"):
        sequence = Sequence(list(tokens), 1, adapter=adapter)
        scheduler.add(sequence)
        run(scheduler)
        assert sequence.cached == 0


def test_no_cache_when_it_is_off() -> None:
    scheduler = Scheduler(limits(prefix_caching=False), SPEED)
    tokens = prompt(64)
    for _ in range(2):
        sequence = Sequence(list(tokens), 1)
        scheduler.add(sequence)
        run(scheduler)
        assert sequence.cached == 0
    assert scheduler.counters.cache_queries == 0


def test_a_full_cache_makes_requests_wait() -> None:
    scheduler = Scheduler(limits(kv_blocks=10), SPEED)
    first, second = Sequence(prompt(100), 4), Sequence(prompt(100), 4)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.step(0.0)
    assert scheduler.running == [first]
    assert scheduler.pool.usage == pytest.approx(0.7)
    run(scheduler)
    assert second.finished
    assert second.preemptions == 0


def test_the_latest_is_preempted_when_blocks_run_out_and_still_ends_whole() -> None:
    scheduler = Scheduler(limits(kv_blocks=8, prefix_caching=False), SPEED)
    early, late = Sequence(prompt(60), 60), Sequence(prompt(60), 60)
    scheduler.add(early)
    scheduler.add(late)
    run(scheduler)
    assert early.preemptions == 0
    assert late.preemptions == 1
    assert scheduler.counters.preemptions == 1
    assert (early.generated, late.generated) == (60, 60)


def test_preemption_changes_nothing_about_the_text() -> None:
    texts = []
    for blocks in (8, 100):
        scheduler = Scheduler(limits(kv_blocks=blocks), SPEED)
        pair = [Sequence(list(range(start, start + 60)), 60, state=start) for start in (5_000, 9_000)]
        for sequence in pair:
            scheduler.add(sequence)
        run(scheduler)
        texts.append([sequence.tokens for sequence in pair])
    assert texts[0] == texts[1]


def test_only_so_many_adapters_run_at_once_and_others_go_past() -> None:
    scheduler = Scheduler(limits(max_loras=1), SPEED)
    a, b, base = (Sequence(prompt(8), 2, adapter=name) for name in ("a", "b", ""))
    for sequence in (a, b, base):
        scheduler.add(sequence)
    scheduler.step(0.0)
    assert scheduler.running == [a, base]
    assert list(scheduler.waiting) == [b]
    run(scheduler)
    assert b.finished


def test_the_queue_has_a_bound() -> None:
    scheduler = Scheduler(limits(max_num_queued=2), SPEED)
    assert [scheduler.add(Sequence(prompt(4), 1)) for _ in range(3)] == [True, True, False]


def test_a_stalled_request_keeps_its_place_and_lets_others_go_on() -> None:
    scheduler = Scheduler(limits(), SPEED)
    silent, other = Sequence(prompt(8), 9, stall_after=2), Sequence(prompt(8), 9)
    scheduler.add(silent)
    scheduler.add(other)
    run(scheduler)
    assert (silent.generated, other.generated) == (2, 9)
    assert scheduler.running == [silent]
    scheduler.abort(silent)
    assert scheduler.pool.usage == 0


def test_an_embedding_stalls_like_an_answer() -> None:
    scheduler = Scheduler(limits(), SPEED)
    sequence = Sequence(prompt(20), 0, stall_after=0)
    scheduler.add(sequence)
    run(scheduler)
    assert scheduler.running == [sequence]


def test_embeddings_end_with_their_prompt() -> None:
    scheduler = Scheduler(limits(), SPEED)
    sequence = Sequence(prompt(20), 0)
    scheduler.add(sequence)
    step = scheduler.step(0.0)
    assert step.pooled == [sequence]
    assert step.seconds == pytest.approx(0.030)
    assert not scheduler.running


def test_jitter_is_repeatable() -> None:
    def times() -> list[float]:
        speed = Speed(prefill_base=0, prefill_rate=1e6, decode_base=0.02, decode_per_sequence=0, jitter=0.1)
        scheduler = Scheduler(limits(), speed, seed=7)
        scheduler.add(Sequence(list(range(10)), 20))
        return [scheduler.step(0.0).seconds for _ in range(20)]

    assert times() == times()
    assert len(set(times())) > 10


@dataclass(frozen=True)
class Arrival:
    """One request of the property test."""

    group: int
    """Which shared beginning."""
    shared: int
    """Blocks of it."""
    own: int
    """Tokens of its own."""
    generate: int
    pause: int
    """Steps until the next one arrives."""
    abort: int | None
    """Steps after which its client leaves."""
    adapter: str

    def sequence(self) -> Sequence:
        tokens = list(range(self.group * 1000, self.group * 1000 + self.shared * 16)) + prompt(self.own)
        return Sequence(tokens, self.generate, adapter=self.adapter)


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 3),
        st.integers(0, 5),
        st.integers(1, 40),
        st.integers(0, 30),
        st.integers(0, 5),
        st.none() | st.integers(0, 39),
        st.sampled_from(("", "a", "b", "c")),
    ),
    min_size=1,
    max_size=25,
)
BOUNDS = st.builds(
    lambda blocks, seqs, budget, chunked, caching: limits(
        kv_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(budget, seqs),
        chunked_prefill=chunked,
        prefix_caching=caching,
        max_loras=1,
    ),
    st.integers(10, 40),
    st.integers(1, 6),
    st.integers(1, 100),
    st.booleans(),
    st.booleans(),
)


@settings(deadline=None)
@given(ARRIVALS, BOUNDS)
def test_every_request_ends_and_every_block_comes_back(arrivals: list[Arrival], bounds: Limits) -> None:
    scheduler = Scheduler(bounds, SPEED)
    sequences: list[Sequence] = []
    leaving: dict[int, list[Sequence]] = {}
    aborted: list[Sequence] = []

    def leave(victims: list[Sequence]) -> None:
        for victim in victims:
            aborted.append(victim)
            scheduler.abort(victim)

    clock = 0
    for arrival in arrivals:
        sequence = arrival.sequence()
        if not scheduler.fits(sequence.prompt_length, arrival.generate):
            continue
        scheduler.add(sequence)
        sequences.append(sequence)
        if arrival.abort is not None:
            leaving.setdefault(clock + arrival.abort, []).append(sequence)
        for _ in range(arrival.pause):
            check(scheduler, bounds)
            clock += 1
            leave(leaving.pop(clock, []))
    for victims in leaving.values():
        leave(victims)
    while scheduler.running or scheduler.waiting:
        check(scheduler, bounds)
    assert scheduler.pool.free == bounds.kv_blocks
    assert all(sequence.finished for sequence in sequences)
    assert all(s.generated == s.max_tokens for s in sequences if s not in aborted)
    assert scheduler.counters.cache_hits <= scheduler.counters.cache_queries


def check(scheduler: Scheduler, bounds: Limits) -> None:
    busy = bool(scheduler.running or scheduler.waiting)
    step = scheduler.step(0.0)
    assert len(scheduler.running) <= bounds.max_num_seqs
    assert step.prefill_tokens + step.decodes <= bounds.max_num_batched_tokens
    assert 0 <= scheduler.pool.usage <= 1
    assert len({s.adapter for s in scheduler.running if s.adapter}) <= bounds.max_loras
    # A step of a busy engine always moves something, or it would stand still for ever.
    assert not busy or step.seconds > 0 or step.preempted


def test_the_oldest_unused_block_goes_first_and_the_beginning_of_a_prompt_last() -> None:
    pool = BlockPool(4)
    hashes = list(block_hashes(list(range(48)), 16))
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, value in zip(blocks, hashes, strict=True):
        pool.remember(block, value)
    pool.release(blocks)
    assert pool.allocate(2) is not None  # the one that was never used, and the end of the prompt
    found = pool.take_cached(hashes)
    assert found == blocks[:2]
    assert pool.allocate(1) is None


def test_a_hash_names_everything_before_the_block() -> None:
    one = list(block_hashes([1] * 16 + [9] * 16, 16))
    other = list(block_hashes([2] * 16 + [9] * 16, 16))
    assert one[1] != other[1]
    assert list(block_hashes([1] * 16 + [9] * 16, 16, parent=one[0], start=16)) == one[1:]


def test_the_cache_can_be_forgotten_only_while_nothing_uses_it() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or []
    pool.remember(block, b"x")
    assert not pool.reset()
    pool.release([block])
    assert pool.reset()
    assert pool.take_cached([b"x"]) == []
    assert pool.free == 2
