from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelfleet_serving.router.holding import (
    HoldingQueue,
    PriorityError,
    QueueFullError,
    Ticket,
    parse_priority,
)


@dataclass(eq=False)
class Request:
    number: int
    tenant: str
    priority: int
    lane: str
    size: int
    deadline: float
    ticket: Ticket[Request] | None = None


class HoldingMachine(RuleBasedStateMachine):
    """Against a plain list: nothing is lost, doubled, overtaken or kept beyond the bounds."""

    @initialize(max_requests=st.integers(0, 12), max_bytes=st.integers(0, 400))
    def start(self, max_requests: int, max_bytes: int) -> None:
        self.queue: HoldingQueue[Request] = HoldingQueue(max_requests, max_bytes)
        self.most = max_requests
        self.waiting: list[Request] = []
        self.refused: list[float] = []
        self.number = 0
        self.now = 0.0

    @rule(
        tenant=st.sampled_from("abc"),
        priority=st.sampled_from([-1, 0, 1]),
        lane=st.sampled_from("xy"),
        size=st.integers(0, 150),
        patience=st.floats(0, 20),
    )
    def put(self, tenant: str, priority: int, lane: str, size: int, patience: float) -> None:
        self.number += 1
        request = Request(self.number, tenant, priority, lane, size, self.now + patience)
        full = len(self.waiting) >= self.queue.max_requests or (
            sum(one.size for one in self.waiting) + size > self.queue.max_bytes
        )
        try:
            request.ticket, pushed_out = self.queue.put(
                request,
                now=self.now,
                deadline=request.deadline,
                size=size,
                tenant=tenant,
                priority=priority,
                lane=lane,
            )
        except QueueFullError as error:
            assert full
            self.refused.append(error.retry_after)
            return
        assert bool(pushed_out) == full
        assert len(self.queue) <= max(self.queue.max_requests, len(self.waiting))
        room = self.queue.max_bytes - sum(one.size for one in self.waiting)
        assert len(pushed_out) <= 1 or room < size  # one place, or room for the body
        for victim in pushed_out:
            assert victim.priority <= priority
            assert victim is not request
            if victim.priority == priority:
                assert victim.tenant != tenant
            # The newest of its tenant and class go first.
            peers = [
                one for one in self.waiting if (one.tenant, one.priority) == (victim.tenant, victim.priority)
            ]
            assert victim is peers[-1]
            self.waiting.remove(victim)
        self.waiting.append(request)

    @rule(open_lanes=st.sets(st.sampled_from("xy")), places=st.integers(1, 4))
    def take(self, open_lanes: set[str], places: int) -> None:
        blocked: set[object] = set()
        for _ in range(places):
            found = self.queue.take(
                lambda one: one.lane if one.lane in open_lanes else None, self.now, blocked
            )
            able = [one for one in self.waiting if one.lane in open_lanes]
            if found is None:
                assert not able
                return
            request, endpoint = found
            assert endpoint == request.lane
            assert request is next(
                one for one in able if (one.tenant, one.priority) == (request.tenant, request.priority)
            )
            self.waiting.remove(request)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        assert request.ticket is not None
        assert self.queue.remove(request.ticket)
        assert not self.queue.remove(request.ticket)
        self.waiting.remove(request)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        expired = self.queue.expire(self.now)
        assert set(expired) == {one for one in self.waiting if one.deadline <= self.now}
        assert len(set(expired)) == len(expired)
        for request in expired:
            self.waiting.remove(request)

    @rule(max_requests=st.integers(0, 12))
    def change_bounds(self, max_requests: int) -> None:
        self.queue.max_requests = max_requests
        self.most = max(max_requests, len(self.waiting))

    @rule()
    def clear(self) -> None:
        assert self.queue.clear() == self.waiting
        self.waiting = []

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.waiting) <= self.most
        assert self.queue.size == sum(one.size for one in self.waiting) <= self.queue.max_bytes
        assert all(1 <= seconds <= 120 for seconds in self.refused)
        assert self.queue.lanes() == Counter(one.lane for one in self.waiting)


TestHolding = HoldingMachine.TestCase
TestHolding.settings = settings(max_examples=80, stateful_step_count=40)


def always(item: object) -> bool:
    return True


def filled(counts: dict[tuple[str, int], int]) -> HoldingQueue[tuple[str, int]]:
    queue: HoldingQueue[tuple[str, int]] = HoldingQueue(10_000, 0)
    for (tenant, priority), number in counts.items():
        for _ in range(number):
            queue.put((tenant, priority), now=0.0, deadline=1e9, tenant=tenant, priority=priority)
    return queue


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 40), min_size=1, max_size=8))
def test_tenants_take_turns_however_much_each_has_waiting(waiting: dict[str, int]) -> None:
    queue = filled({(tenant, 0): number for tenant, number in waiting.items()})
    served: Counter[str] = Counter()
    while (found := queue.take(always, 0.0, set())) is not None:
        served[found[0][0]] += 1
        backlogged = [served[tenant] for tenant, number in waiting.items() if served[tenant] < number]
        if backlogged:
            assert max(backlogged) - min(backlogged) <= 1
    assert served == waiting


@given(st.sets(st.integers(-2, 2), min_size=1))
def test_higher_classes_are_served_more_and_none_starves(classes: set[int]) -> None:
    queue = filled({("t", priority): 500 for priority in classes})
    served: Counter[int] = Counter()
    for _ in range(400):
        found = queue.take(always, 0.0, set())
        assert found is not None
        served[found[0][1]] += 1
    total = sum(4.0**priority for priority in classes)
    for priority in classes:
        assert served[priority] == pytest.approx(400 * 4.0**priority / total, abs=2)


def test_a_tenant_that_leaves_and_comes_back_gains_nothing() -> None:
    queue = filled({("steady", 0): 100})
    served: Counter[str] = Counter()
    for _ in range(60):
        queue.put(("hopper", 0), now=0.0, deadline=1e9, tenant="hopper")
        found = queue.take(always, 0.0, set())
        assert found is not None
        served[found[0][0]] += 1
        if served["hopper"] < 30:
            queue.put(("hopper", 0), now=0.0, deadline=1e9, tenant="hopper")
    assert abs(served["hopper"] - served["steady"]) <= 1


def test_what_a_tenant_did_not_use_is_not_saved_up() -> None:
    queue = filled({("early", 0): 200})
    for _ in range(100):
        queue.take(always, 0.0, set())
    for _ in range(50):
        queue.put(("late", 0), now=0.0, deadline=1e9, tenant="late")
    served = Counter(queue.take(always, 0.0, set())[0][0] for _ in range(40))  # type: ignore[index]
    assert served["late"] == pytest.approx(20, abs=1)


def test_a_lane_that_is_stuck_holds_up_nobody_else() -> None:
    queue: HoldingQueue[str] = HoldingQueue(10, 0)
    for name, lane in (("a1", "awq"), ("a2", "awq"), ("b1", None), ("a3", "awq"), ("b2", None)):
        queue.put(name, now=0.0, deadline=9.0, lane=lane)
    asked = []

    def choose(name: str) -> bool | None:
        asked.append(name)
        return True if name.startswith("b") else None

    blocked: set[object] = set()
    taken = []
    while (found := queue.take(choose, 0.0, blocked)) is not None:
        taken.append(found[0])
    assert taken == ["b1", "b2"]
    assert asked.count("a1") == 1  # a stuck lane is asked once a round
    assert "a2" not in asked


def test_a_flood_of_one_tenant_is_pushed_out_by_others_newest_first() -> None:
    queue: HoldingQueue[str] = HoldingQueue(4, 0)
    for number in range(4):
        queue.put(f"flood-{number}", now=0.0, deadline=9.0, tenant="flood")
    assert queue.put("other-0", now=1.0, deadline=9.0, tenant="other")[1] == ["flood-3"]
    assert queue.put("other-1", now=1.0, deadline=9.0, tenant="other")[1] == ["flood-2"]
    with pytest.raises(QueueFullError):
        queue.put("other-2", now=1.0, deadline=9.0, tenant="other")
    with pytest.raises(QueueFullError):
        queue.put("flood-4", now=1.0, deadline=9.0, tenant="flood")


def test_a_higher_class_pushes_out_a_lower_one_but_not_the_other_way() -> None:
    queue: HoldingQueue[str] = HoldingQueue(2, 0)
    queue.put("batch", now=0.0, deadline=9.0, priority=-1)
    queue.put("chat", now=0.0, deadline=9.0)
    assert queue.put("urgent", now=0.0, deadline=9.0, priority=1)[1] == ["batch"]
    with pytest.raises(QueueFullError):
        queue.put("batch", now=0.0, deadline=9.0, priority=-1)


def test_nothing_is_pushed_out_for_a_request_that_fits_nowhere() -> None:
    queue: HoldingQueue[str] = HoldingQueue(5, 100)
    queue.put("batch", now=0.0, deadline=9.0, size=90, priority=-1)
    with pytest.raises(QueueFullError):
        queue.put("huge", now=0.0, deadline=9.0, size=101, priority=1)
    assert len(queue) == 1


def test_retry_after_follows_the_observed_drain_rate() -> None:
    queue = filled({("t", 0): 100})
    assert queue.retry_after(0.0) == 5.0  # nothing is known yet
    for step in range(40):
        queue.take(always, step * 0.5, set())
    assert queue.retry_after(20.0) == pytest.approx(61 / 2, rel=0.1)
    # A queue that stands still tells clients to stay away longer, up to the limit.
    assert queue.retry_after(60.0) > 60
    assert queue.retry_after(1000.0) == 120


def test_the_deadline_heap_does_not_grow_with_clients_that_come_and_go() -> None:
    queue: HoldingQueue[int] = HoldingQueue(10, 0)
    for number in range(10_000):
        queue.remove(queue.put(number, now=0.0, deadline=1e9, tenant=str(number))[0])
    assert len(queue._deadlines) < 200


@pytest.mark.parametrize(
    ("text", "highest", "expected"),
    [
        (None, 0, 0),
        (None, -1, -1),
        (None, 5, 0),
        ("low", 1, -1),
        ("High", 1, 1),
        ("high", 0, 0),
        (" 3 ", 5, 3),
        ("-5", 0, -5),
    ],
)
def test_priority_is_bounded_by_the_key(text: str | None, highest: int, expected: int) -> None:
    assert parse_priority(text, highest) == expected


@pytest.mark.parametrize("text", ["urgent", "", "6", "-6", "1.5", "nan", "9" * 5000])
def test_a_priority_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PriorityError, match="low, normal, high"):
        parse_priority(text)


def test_of_classes_with_equal_turns_the_higher_one_goes_first() -> None:
    """Who came first decides within a class only."""
    queue: HoldingQueue[str] = HoldingQueue(10, 1000)
    for name, priority in (("low", -1), ("normal", 0), ("high", 1)):
        queue.put(name, now=0.0, deadline=9.0, priority=priority)
    taken = []
    while (found := queue.take(lambda item: item, 0.0, set())) is not None:
        taken.append(found[0])
    assert taken == ["high", "normal", "low"]
