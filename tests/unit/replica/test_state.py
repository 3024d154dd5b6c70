"""The supervisor's state machine: scenarios, and what holds for every sequence of events."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from modelfleet_serving.contract import EndpointState
from modelfleet_serving.supervisor.state import (
    Action,
    Alive,
    Answers,
    Event,
    Failed,
    Launched,
    Left,
    Limits,
    Load,
    Phase,
    State,
    Stop,
    Tick,
    begin,
    step,
)

LIMITS = Limits(start=100, drain=50, leave=10, end=15, backoff_first=1, backoff_most=8, stable=60, hopeless=3)
BOOM = Failed("EngineExited", "boom")


class Run:
    def __init__(self) -> None:
        self.now = 0.0
        self.state, self.actions = begin(0.0)

    def __call__(self, *events: Event, after: float = 0.0) -> Run:
        self.now += after
        for event in events:
            self.state, self.actions = step(self.state, event, self.now, LIMITS)
        return self

    def ready(self) -> Run:
        return self(Launched(), Answers())


def test_the_normal_life() -> None:
    run = Run()
    assert run.actions == [Action.LAUNCH, Action.REPORT]
    assert run(Launched()).state.endpoint is EndpointState.STARTING
    assert run(Answers()).state.endpoint is EndpointState.READY
    run(Stop())
    assert (run.state.endpoint, run.actions) == (EndpointState.DRAINING, [Action.REPORT])
    assert run(Load(0), Load(0)).state.phase is Phase.LEAVING, "routers may still send"
    assert run(Left(), Load(0)).state.phase is Phase.DRAINING
    assert run(Load(1), Load(0)).state.phase is Phase.DRAINING, "twice in a row"
    run(Load(0))
    assert (run.state.phase, run.actions) == (Phase.ENDING, [Action.TERMINATE])
    run(Failed("EngineExited", ""))
    assert (run.state.phase, run.actions) == (Phase.GONE, [Action.REPORT])


def test_the_start_has_a_deadline() -> None:
    run = Run()(Launched())
    assert run(Tick(), after=99).actions == []
    assert run(Tick(), after=1).actions == [Action.KILL]
    assert run(Answers()).state.endpoint is EndpointState.STARTING, "too late, it is being killed"
    run(Failed("EngineKilled", "its last lines"))
    assert (run.state.phase, run.state.reason) == (Phase.BACKOFF, "StartTimeout")
    assert "100 s" in run.state.message
    assert "its last lines" in run.state.message


def test_the_backoff_doubles_up_to_a_bound_and_begins_anew_after_a_stable_time() -> None:
    run = Run()
    waits = []
    for _ in range(6):
        run(Launched(), BOOM)
        assert run.state.deadline is not None
        waits.append(run.state.deadline - run.now)
        run(Tick(), after=waits[-1])
        assert run.actions == [Action.LAUNCH, Action.REPORT]
    assert waits == [1, 2, 4, 8, 8, 8]
    assert run.state.restarts == 6
    assert run.state.hopeless(LIMITS)
    run.ready()(BOOM, after=60)
    assert run.state.deadline == run.now + 1
    assert not run.state.hopeless(LIMITS)


def test_a_reason_stands_until_the_engine_is_ready_again() -> None:
    run = Run()(Launched(), BOOM)
    assert (run.state.endpoint, run.state.reason) == (EndpointState.FAILED, "EngineExited")
    run(Tick(), after=1)(Launched())
    assert (run.state.endpoint, run.state.reason) == (EndpointState.STARTING, "EngineExited")
    assert run(Answers()).state.reason == ""


def test_only_failures_in_a_row_count_against_a_running_engine() -> None:
    run = Run().ready()
    bad = Alive(False, "no answer")
    run(bad, bad, Alive(True), bad, bad)
    assert (run.state.phase, run.actions) == (Phase.READY, [])
    run(bad)
    assert run.actions == [Action.KILL]
    assert run(bad).actions == [], "once"
    run(Failed("EngineKilled", ""))
    assert run.state.reason == "Unresponsive"


@pytest.mark.parametrize("leave", [True, False])
def test_a_drain_has_one_deadline(leave: bool) -> None:
    run = Run().ready()(Stop())
    run(Left()) if leave else run(Tick(), after=10)
    assert run.state.phase is Phase.DRAINING
    run(Load(1), Tick(), after=60 - run.now)
    assert (run.state.phase, run.actions) == (Phase.ENDING, [Action.TERMINATE])
    run(Tick(), after=15)
    assert run.actions == [Action.KILL]


def test_an_engine_that_seems_idle_keeps_the_rest_of_the_drain_time() -> None:
    """Its gauges may lag behind a long prefill."""
    run = Run().ready()(Stop(), Left(), Load(0), Load(0))
    assert run.actions == [Action.TERMINATE]
    assert run(Tick(), after=70).actions == []
    assert run(Tick(), after=5).actions == [Action.KILL]


@pytest.mark.parametrize("before", [[], [Launched()], [BOOM], [Launched(), BOOM]])
def test_stopping_an_engine_that_serves_nobody_is_quick(before: list[Event]) -> None:
    run = Run()(*before)(Stop())
    if run.state.phase is Phase.ENDING and before:
        assert Action.KILL in run.actions
        run(BOOM)
    elif not before:
        assert run(Launched()).actions == [Action.KILL], "it was being made"
        run(BOOM)
    assert run.state.phase is Phase.GONE


EVENTS = st.sampled_from(
    [Launched(), BOOM, Answers(), Alive(True), Alive(False), Load(0), Load(2), Left(), Tick()]
)
STEPS = st.lists(st.tuples(EVENTS, st.floats(0, 40)), max_size=60)


@given(STEPS, st.integers(0, 60))
@settings(deadline=None)
def test_what_always_holds(steps: list[tuple[Event, float]], stop_at: int) -> None:
    """Events as a real engine sends them, in any order; stopped at any moment."""
    now = 0.0
    state, actions = begin(now)
    process, stopped = False, False
    launching = True
    for number, (event, pause) in enumerate(steps):
        now += pause
        if number == stop_at:
            state, actions = step(state, Stop(), now, LIMITS)
            stopped = True
        if isinstance(event, Launched) and not launching:
            continue  # only what is launched can be there
        if isinstance(event, Failed) and not (process or launching):
            continue
        if isinstance(event, Launched):
            process, launching = True, False
        if isinstance(event, Failed):
            process, launching = False, False
        before = state
        state, actions = step(state, event, now, LIMITS)
        launching = launching or Action.LAUNCH in actions
        _check(before, state, actions, process, stopped)


def _check(before: State, state: State, actions: list[Action], process: bool, stopped: bool) -> None:
    if Action.LAUNCH in actions:
        assert not process, "never two engines"
        assert not stopped, "never after the stop"
    if before.phase is Phase.GONE:
        assert state.phase is Phase.GONE
        assert Action.LAUNCH not in actions
    if state.endpoint is EndpointState.READY:
        assert process, "never ready without an engine"
        assert not stopped
    if stopped:
        assert state.endpoint is EndpointState.DRAINING
    if state.endpoint is not before.endpoint:
        assert Action.REPORT in actions, "routers hear of every change"
    waits = state.phase in (Phase.STARTING, Phase.BACKOFF, Phase.LEAVING, Phase.DRAINING, Phase.ENDING)
    assert not waits or state.deadline is not None or state.blame is not None, "nothing waits for ever"
    assert state.restarts >= before.restarts


@given(STEPS)
@settings(deadline=None)
def test_a_stop_always_comes_to_its_end(steps: list[tuple[Event, float]]) -> None:
    """Whatever was before, and even if nobody answers any more, time alone ends it."""
    now = 0.0
    state, _ = begin(now)
    for event, pause in steps:
        now += pause
        if not (isinstance(event, Launched | Failed) and state.phase is Phase.BACKOFF):
            state, _ = step(state, event, now, LIMITS)
    state, actions = step(state, Stop(), now, LIMITS)
    for _ in range(10):
        if state.phase is Phase.GONE:
            return
        assert state.deadline is not None
        now = max(now, state.deadline)
        state, actions = step(state, Tick(), now, LIMITS)
        if Action.KILL in actions:
            state, actions = step(state, BOOM, now, LIMITS)
    pytest.fail(f"still {state.phase}")
