"""What a supervisor does with its engine, as a pure state machine: events in, actions out.

::

    Launching ──► Starting ──► Ready ──► (stop) ──► Leaving ──► Draining ──► Ending ──► Gone
        ▲            │           │
        └── Backoff ◄┴───────────┘  exit, start deadline, failed liveness

*Leaving* waits until every router has taken over a table without this engine, *Draining* until nothing runs
in it, *Ending* until its processes are gone; each has a deadline.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from modelfleet_serving.contract import EndpointState


class Phase(enum.Enum):
    """Where an engine is in its life."""

    LAUNCHING = "Launching"
    """The weights and the environment are looked up, the process is made."""
    STARTING = "Starting"
    READY = "Ready"
    BACKOFF = "Backoff"
    LEAVING = "Leaving"
    DRAINING = "Draining"
    ENDING = "Ending"
    GONE = "Gone"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Times in seconds."""

    start: float
    """From a launch to readiness, looking up the weights left out."""
    drain: float
    """Given to running requests."""
    leave: float = 10.0
    """Given to the routers to take over the table; a registry that is away must not stop us from ending."""
    end: float = 15.0
    """For the engine's tear-down, once its requests are done or out of time; then it is killed."""
    backoff_first: float = 1.0
    backoff_most: float = 60.0
    stable: float = 60.0
    """An engine that was ready for so long starts with the first backoff again."""
    liveness_failures: int = 3
    """In a row, before a running engine is restarted."""
    hopeless: int = 5
    """Failures in a row after which another node may do better."""
    idle_readings: int = 2
    """In a row without a request, before the engine counts as drained."""


# --- Events ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launched:
    """The process exists."""


@dataclass(frozen=True)
class Failed:
    """The engine couldn't be launched or has ended; none of its processes is left."""

    reason: str
    message: str
    jitter: float = 1.0
    """0.5..1: the share of the backoff to wait, drawn by the caller."""


@dataclass(frozen=True)
class Answers:
    """The readiness probe succeeded."""


@dataclass(frozen=True)
class Alive:
    """The liveness probe's result."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Load:
    """Requests in the engine."""

    requests: int


@dataclass(frozen=True)
class Left:
    """No router sends new requests any more."""


@dataclass(frozen=True)
class Stop:
    """End for good."""


@dataclass(frozen=True)
class Tick:
    """A deadline may have passed."""


Event = Launched | Failed | Answers | Alive | Load | Left | Stop | Tick


# --- Actions ---------------------------------------------------------------------------------------


class Action(enum.Enum):
    """What the caller has to do."""

    LAUNCH = "launch"
    """Look up weights and environment, make the process; tell :class:`Launched` or :class:`Failed`."""
    TERMINATE = "terminate"
    """Send the engine its end signal; :class:`Failed` tells when it is gone."""
    KILL = "kill"
    """End the whole process tree at once; likewise."""
    REPORT = "report"
    """Tell the registry now."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that decides what happens next. Times are monotonic seconds."""

    phase: Phase = Phase.LAUNCHING
    since: float = 0.0
    deadline: float | None = None
    """When a :class:`Tick` is due."""
    drain_until: float = 0.0
    has_process: bool = False
    failures: int = 0
    """In a row."""
    restarts: int = 0
    liveness_failures: int = 0
    idle_readings: int = 0
    blame: tuple[str, str] | None = None
    """Why we ended the engine ourselves: its exit then has this reason and message."""
    reason: str = ""
    message: str = ""

    @property
    def endpoint(self) -> EndpointState:
        """As routers are told."""
        return _ENDPOINT[self.phase]

    def hopeless(self, limits: Limits) -> bool:
        """Whether the engine fails again and again here."""
        return self.failures >= limits.hopeless


_ENDPOINT = {
    Phase.LAUNCHING: EndpointState.STARTING,
    Phase.STARTING: EndpointState.STARTING,
    Phase.READY: EndpointState.READY,
    Phase.BACKOFF: EndpointState.FAILED,
    Phase.LEAVING: EndpointState.DRAINING,
    Phase.DRAINING: EndpointState.DRAINING,
    Phase.ENDING: EndpointState.DRAINING,
    Phase.GONE: EndpointState.DRAINING,
}
_STOPPING = frozenset({Phase.LEAVING, Phase.DRAINING, Phase.ENDING, Phase.GONE})

Step = tuple[State, list[Action]]


def begin(now: float) -> Step:
    """The first step."""
    return State(since=now), [Action.LAUNCH, Action.REPORT]


def step(state: State, event: Event, now: float, limits: Limits) -> Step:
    """The next state, and what has to be done."""
    match event:
        case Launched():
            return _launched(state, now, limits)
        case Failed():
            return _failed(state, event, now, limits)
        case Answers() if state.phase is Phase.STARTING and state.blame is None:
            ready = replace(state, phase=Phase.READY, since=now, deadline=None, liveness_failures=0)
            return replace(ready, reason="", message=""), [Action.REPORT]
        case Alive() if state.phase is Phase.READY:
            return _alive(state, event, limits)
        case Load() if state.phase is Phase.DRAINING:
            return _idle(state, event, now, limits)
        case Left() if state.phase is Phase.LEAVING:
            return _drain(state, now), []
        case Stop() if state.phase not in _STOPPING:
            return _stop(state, now, limits)
        case Tick() if state.deadline is not None and now >= state.deadline:
            return _late(state, now, limits)
    return state, []


def _launched(state: State, now: float, limits: Limits) -> Step:
    state = replace(state, has_process=True)
    if state.phase is Phase.LAUNCHING:
        return replace(state, phase=Phase.STARTING, since=now, deadline=now + limits.start), [Action.REPORT]
    return state, [Action.KILL]  # stopped while it was made


def _failed(state: State, event: Failed, now: float, limits: Limits) -> Step:
    if state.phase in _STOPPING:
        gone = replace(state, phase=Phase.GONE, since=now, deadline=None, has_process=False)
        return gone, [Action.REPORT]
    reason, message = state.blame or (event.reason, event.message)
    if state.blame is not None and event.message:
        message = f"{message}\n{event.message}"
    was_stable = state.phase is Phase.READY and now - state.since >= limits.stable
    failures = 1 if was_stable else state.failures + 1
    wait = min(limits.backoff_most, limits.backoff_first * 2.0 ** min(failures - 1, 16)) * event.jitter
    failed = State(
        phase=Phase.BACKOFF,
        since=now,
        deadline=now + wait,
        failures=failures,
        restarts=state.restarts,
        reason=reason,
        message=message,
    )
    return failed, [Action.REPORT]


def _alive(state: State, event: Alive, limits: Limits) -> Step:
    if event.ok:
        return (replace(state, liveness_failures=0) if state.liveness_failures else state), []
    failures = state.liveness_failures + 1
    state = replace(state, liveness_failures=failures)
    if failures < limits.liveness_failures or state.blame is not None:
        return state, []
    blame = ("Unresponsive", f"{failures} health checks in a row failed: {event.detail}")
    return replace(state, blame=blame), [Action.KILL]


def _stop(state: State, now: float, limits: Limits) -> Step:
    if state.phase is Phase.READY and state.blame is None:
        leaving = replace(state, phase=Phase.LEAVING, since=now, deadline=now + limits.leave)
        return replace(leaving, drain_until=now + limits.leave + limits.drain), [Action.REPORT]
    if state.has_process:
        ending = replace(state, phase=Phase.ENDING, since=now, deadline=now + limits.end)
        return ending, [Action.KILL, Action.REPORT]
    if state.phase is Phase.LAUNCHING:
        # The launch tells when it has ended or has a process, which is killed then.
        return replace(state, phase=Phase.ENDING, since=now, deadline=now + limits.end), [Action.REPORT]
    return replace(state, phase=Phase.GONE, since=now, deadline=None), [Action.REPORT]


def _drain(state: State, now: float) -> State:
    return replace(state, phase=Phase.DRAINING, since=now, deadline=state.drain_until, idle_readings=0)


def _idle(state: State, event: Load, now: float, limits: Limits) -> Step:
    idle = state.idle_readings + 1 if event.requests == 0 else 0
    if idle >= limits.idle_readings:
        return _end(state, now, limits)
    return replace(state, idle_readings=idle), []


def _end(state: State, now: float, limits: Limits) -> Step:
    # An engine's gauges may lag behind a request that it has just taken: what is left of the drain time is
    # still the engine's, which ends at once when nothing runs.
    deadline = max(now, state.drain_until) + limits.end
    return replace(state, phase=Phase.ENDING, since=now, deadline=deadline), [Action.TERMINATE]


def _late(state: State, now: float, limits: Limits) -> Step:
    match state.phase:
        case Phase.STARTING:
            blame = ("StartTimeout", f"not ready {limits.start:g} s after its start")
            return replace(state, deadline=None, blame=blame), [Action.KILL]
        case Phase.BACKOFF:
            again = replace(
                state, phase=Phase.LAUNCHING, since=now, deadline=None, restarts=state.restarts + 1
            )
            return again, [Action.LAUNCH, Action.REPORT]
        case Phase.LEAVING:
            return _drain(state, now), []
        case Phase.DRAINING:
            return _end(state, now, limits)
        case Phase.ENDING if state.has_process:
            return replace(state, deadline=now + limits.end), [Action.KILL]
        case Phase.ENDING:
            return replace(state, phase=Phase.GONE, since=now, deadline=None), [Action.REPORT]
        case _:
            return replace(state, deadline=None), []
