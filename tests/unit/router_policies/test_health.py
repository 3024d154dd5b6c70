from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modelfleet_serving.router.choice import UNLIMITED
from modelfleet_serving.router.health import (
    Circuit,
    Failure,
    OutlierDetector,
    Outliers,
    RetryBudget,
    State,
    limit_of,
)


@dataclass
class Sized:
    ready: bool = True
    capacity: int | None = None


def detector(ready: int = 4, **changes: object) -> OutlierDetector:
    found = OutlierDetector(Outliers(**changes), random.Random(1))  # type: ignore[arg-type]
    found.ready = ready
    return found


def fail(health: OutlierDetector, circuit: Circuit, times: int, now: float = 0.0) -> bool:
    return [health.failed(circuit, Failure.STATUS, now) for _ in range(times)][-1]


def test_failures_in_a_row_eject_and_a_success_between_them_does_not() -> None:
    health = detector()
    circuit = health.circuit("a")
    assert not fail(health, circuit, 4)
    assert not health.succeeded(circuit, 0.0)
    assert not fail(health, circuit, 4)
    assert circuit.state is State.CLOSED
    assert fail(health, circuit, 1)
    assert circuit.state is State.OPEN
    assert circuit.reason is Failure.STATUS


def test_what_comes_late_from_one_that_has_left_changes_nothing() -> None:
    health = detector()
    left = health.circuit("a")
    assert fail(health, left, 5)
    assert health.sweep(1e6) == [left]
    health.forget("a")
    again = health.circuit("a")
    assert fail(health, again, 5)
    assert not any(health.succeeded(left, 1e6) for _ in range(50))
    assert not fail(health, left, 50, now=1e6)
    assert (health.out, again.state) == (1, State.OPEN)


def test_a_second_refused_connection_ejects() -> None:
    health = detector()
    circuit = health.circuit("a")
    assert not health.failed(circuit, Failure.CONNECT, 0.0)
    assert health.failed(circuit, Failure.CONNECT, 0.1)


def test_a_high_share_of_failures_ejects_though_successes_lie_between() -> None:
    health = detector()
    circuit = health.circuit("a")
    for number in range(40):
        now = number * 0.1
        if health.failed(circuit, Failure.TIMEOUT, now):
            break
        health.succeeded(circuit, now)
    assert circuit.state is State.OPEN


def test_rare_failures_never_eject() -> None:
    health = detector()
    circuit = health.circuit("a")
    for number in range(2000):
        now = number * 0.01
        assert not (
            health.failed(circuit, Failure.STATUS, now) if number % 4 == 0 else health.succeeded(circuit, now)
        )


def test_probation_lets_one_through_then_four_then_all() -> None:
    health = detector()
    circuit, endpoint = health.circuit("a"), Sized(capacity=16)
    assert limit_of(endpoint, circuit) == 16
    fail(health, circuit, 5)
    assert limit_of(endpoint, circuit) == 0
    assert health.sweep(0.99) == []
    assert health.sweep(1.3) == [circuit]
    assert limit_of(endpoint, circuit) == 1
    assert health.succeeded(circuit, 1.4)
    assert limit_of(endpoint, circuit) == 4
    assert health.succeeded(circuit, 1.5)
    assert limit_of(endpoint, circuit) == 16
    assert health.out == 0


def test_limit_follows_the_supervisor_and_an_unknown_capacity() -> None:
    circuit = detector().circuit("a")
    assert limit_of(Sized(ready=False, capacity=8), circuit) == 0
    assert limit_of(Sized(), circuit) == UNLIMITED


def test_ejections_double_up_to_the_longest_and_start_afresh_after_a_good_time() -> None:
    health = detector()
    circuit = health.circuit("a")
    now = 0.0
    fail(health, circuit, 5, now)
    for expected in (1, 2, 4, 8, 16, 32, 60, 60):
        assert expected <= circuit.until - now <= 1.2 * expected
        now = circuit.until
        health.sweep(now)
        health.failed(circuit, Failure.STATUS, now)  # a failed probe ejects at once
    now = circuit.until
    health.sweep(now)
    health.succeeded(circuit, now)
    health.succeeded(circuit, now)
    assert circuit.state is State.CLOSED
    health.succeeded(circuit, now + 59)
    assert circuit.ejections
    health.succeeded(circuit, now + 61)
    assert not circuit.ejections


def test_answers_of_requests_sent_before_the_ejection_change_nothing() -> None:
    health = detector()
    circuit = health.circuit("a")
    fail(health, circuit, 5)
    until = circuit.until
    assert not health.succeeded(circuit, 0.1)
    assert not health.failed(circuit, Failure.BROKEN, 0.1)
    assert (circuit.state, circuit.until) == (State.OPEN, until)


@pytest.mark.parametrize("ready", [0, 1, 2, 4, 10])
def test_where_nothing_listens_only_one_is_left(ready: int) -> None:
    health = OutlierDetector(Outliers(), random.Random(1))
    health.ready = ready
    circuits = [health.circuit(str(number)) for number in range(ready)]
    for circuit in circuits:
        for _ in range(3):
            health.failed(circuit, Failure.CONNECT, 1.0)
    assert sum(circuit.state is State.OPEN for circuit in circuits) == max(0, ready - 1)
    assert not health.sweep(1.0)


@pytest.mark.parametrize(("ready", "allowed"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (10, 5)])
def test_never_all_are_ejected(ready: int, allowed: int) -> None:
    health = detector(ready)
    circuits = [health.circuit(str(number)) for number in range(ready)]
    for circuit in circuits:
        for _ in range(20):
            health.failed(circuit, Failure.STATUS, 0.0)
    assert sum(circuit.state is State.OPEN for circuit in circuits) == allowed


def test_an_ejected_one_comes_back_early_when_the_others_are_gone() -> None:
    health = detector(2)
    circuit = health.circuit("a")
    fail(health, circuit, 5)
    assert health.sweep(0.1) == []
    health.ready = 1
    assert health.sweep(0.1) == [circuit]


def test_one_that_left_is_forgotten() -> None:
    health = detector()
    fail(health, health.circuit("a"), 5)
    health.forget("a")
    assert health.out == 0
    assert health.circuit("a").state is State.CLOSED


class HealthMachine(RuleBasedStateMachine):
    @initialize(count=st.integers(1, 8), seed=st.integers(0, 1000))
    def start(self, count: int, seed: int) -> None:
        self.health = OutlierDetector(Outliers(), random.Random(seed))
        self.health.ready = count
        self.circuits = [self.health.circuit(str(number)) for number in range(count)]
        self.limits = [self.limit(circuit) for circuit in self.circuits]
        self.now = 0.0

    def limit(self, circuit: Circuit) -> int:
        return limit_of(Sized(capacity=32), circuit)

    @rule(index=st.integers(0, 7), failure=st.sampled_from([None, *Failure]), times=st.integers(1, 6))
    def attempt(self, index: int, failure: Failure | None, times: int) -> None:
        index %= len(self.circuits)
        circuit = self.circuits[index]
        for _ in range(times):
            before = self.limit(circuit)
            if failure is None:
                changed = self.health.succeeded(circuit, self.now)
            else:
                changed = self.health.failed(circuit, failure, self.now)
            assert changed == (self.limit(circuit) != before)
        self.limits[index] = self.limit(circuit)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        changed = self.health.sweep(self.now)
        for index, circuit in enumerate(self.circuits):
            if circuit in changed:
                assert circuit.state is State.HALF_OPEN
                self.limits[index] = self.limit(circuit)

    @invariant()
    def nothing_changes_unsaid(self) -> None:
        assert self.limits == [self.limit(circuit) for circuit in self.circuits]

    @invariant()
    def some_are_left(self) -> None:
        # The share that may be ejected for other failures has tests of its own: a probation that fails may
        # exceed it until the next sweep, when connections had failed before.
        opened = sum(circuit.state is State.OPEN for circuit in self.circuits)
        assert opened <= max(0, len(self.circuits) - 1)
        assert self.health.out == sum(circuit.state is not State.CLOSED for circuit in self.circuits)

    @invariant()
    def ejections_end(self) -> None:
        assert all(circuit.until <= self.now + 72 for circuit in self.circuits)


TestHealth = HealthMachine.TestCase
TestHealth.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 3)), max_size=300))
def test_retries_stay_within_their_share(steps: list[tuple[float, int]]) -> None:
    budget = RetryBudget(share=0.2, per_second=1.0, window=10.0)
    now, retries = 100.0, 0
    for requests, (pause, wanted) in enumerate(steps, start=1):
        now += pause
        budget.request(now)
        retries += sum(budget.take(now) for _ in range(wanted))
        assert retries <= 0.2 * requests + 10 + (now - 100.0) * 1.0


def test_a_quiet_model_may_retry_a_little_and_a_busy_one_a_burst() -> None:
    quiet, busy = RetryBudget(), RetryBudget()
    assert sum(quiet.take(5.0) for _ in range(100)) == 30
    assert not quiet.take(5.1)
    assert quiet.take(5.5)
    for number in range(10_000):
        busy.request(number / 1000)
    assert sum(busy.take(10.0) for _ in range(5000)) == pytest.approx(
        0.2 * 1000 * 10 * (1 - 1 / 2.718) + 30, rel=0.02
    )
