"""Passive health of endpoints: ejection of outliers, their way back, and a budget for retries.

Interface::

    health = OutlierDetector(Outliers(), rng)                 # one a variant: shares are of its endpoints
    health.ready = number_of_ready_endpoints                  # at each change of the table
    circuit = health.circuit(endpoint.id)                     # kept on the endpoint

    changed = health.succeeded(circuit, now)                  # an answer below 500 began
    changed = health.failed(circuit, Failure.CONNECT, now)
    if changed:
        endpoint.limit = limit_of(endpoint, circuit)          # and pool.refresh()
    for circuit in health.sweep(now): ...                     # ejections that are over: on probation now
    health.forget(endpoint.id)                                # it left the table

    budget = RetryBudget()                                    # one a model
    budget.request(now)                                       # each first attempt
    if not budget.take(now): ...                              # no retry: answer the failure

**State of a circuit.** ``CLOSED`` takes requests. After enough failures in a row, or at too high a share of
failures, it is ``OPEN`` (ejected) for a time that doubles with each ejection that follows soon. Then it is
``HALF_OPEN`` (on probation): one request at a time is let through, then four; successes close it, a failure
opens it again. An endpoint that has been well for as long as its last ejection starts afresh.

**Never all.** At most a share of a variant's endpoints is ejected, and never the last one: when everything
fails the fault is more likely elsewhere, and trying is better than refusing. Endpoints on probation count
as ejected. Where no connection can be made the share does not matter, only that one is left.

What counts as a failure: a connection that can't be made or breaks before the answer, an answer of 500, 502,
503 or 504, no first byte in time. A 4xx, 429 included, is the client's or the load's doing.
"""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass
from typing import Final, Protocol

from modelfleet_serving.router.policy.group import UNLIMITED

__all__ = ["Circuit", "Failure", "OutlierDetector", "Outliers", "RetryBudget", "State", "limit_of"]

_NEVER: Final = -1e18


class State(enum.IntEnum):
    """Of a circuit; the number is its metric's value."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Failure(enum.Enum):
    """Why an attempt failed; the value is the metric's label."""

    CONNECT = "connect"
    STATUS = "status"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    """The answer broke off, or was no HTTP."""


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """When an endpoint is ejected, and for how long. Times in seconds."""

    consecutive_failures: int = 5
    consecutive_connects: int = 2
    """Connection failures are surer and cheaper to act on: nothing listens there."""
    failure_share: float = 0.5
    """Of the attempts in the window; needs ``window_attempts`` of them."""
    window_seconds: float = 10.0
    window_attempts: int = 20
    base_ejection: float = 1.0
    longest_ejection: float = 60.0
    max_ejected_share: float = 0.5
    """Of a variant's ready endpoints; one may always be ejected where there are at least two."""
    probes: int = 2
    """Successes that end a probation."""


class Circuit:
    """Health of one endpoint as one worker sees it. Only the detector changes it.

    Attributes:
        id: the endpoint's.
        state: see the module.
        until: when an ejection is over.
        ejections: in a row, without a recovery between them.
        reason: of the last ejection.
        probed: successes on probation.
        in_row: failures since the last success; ``connects`` those at the end that were connections.
        attempts: in the window that began at ``window``, with their ``failures``. Counted from the first
            failure on.
        closed_at: when the last probation ended.
    """

    __slots__ = (
        "attempts",
        "closed_at",
        "connects",
        "ejections",
        "failures",
        "id",
        "in_row",
        "probed",
        "reason",
        "state",
        "until",
        "window",
    )

    def __init__(self, identifier: str) -> None:
        self.id = identifier
        self.state = State.CLOSED
        self.until = self.closed_at = 0.0
        self.ejections = 0
        self.reason: Failure | None = None
        self.probed = 0
        self.clear(0.0)

    def clear(self, now: float) -> None:
        """Forgets failures."""
        self.in_row = self.connects = self.attempts = self.failures = 0
        self.window = now

    def count(self, now: float, window: float, *, failed: bool) -> None:
        """Counts an attempt in its window."""
        if now - self.window > window:
            self.window = now
            self.attempts = self.failures = 0
        self.attempts += 1
        self.failures += failed


class _Sized(Protocol):
    @property
    def ready(self) -> bool: ...
    @property
    def capacity(self) -> int | None: ...


def limit_of(endpoint: _Sized, circuit: Circuit) -> int:
    """Requests that an endpoint may have in flight: by its supervisor's word, its capacity and its health.

    On probation that is 1, then 4 after the first success, and so on: it is the least loaded one by then,
    and would get everything at once.
    """
    if not endpoint.ready or circuit.state is State.OPEN:
        return 0
    capacity = UNLIMITED if endpoint.capacity is None else endpoint.capacity
    return min(capacity, 4**circuit.probed) if circuit.state is State.HALF_OPEN else capacity


class OutlierDetector:
    """The circuits of one variant's endpoints.

    Args:
        settings: Thresholds and times.
        rng: Spreads the ends of ejections, so that workers don't probe at the same moment.

    Attributes:
        ready: endpoints that their supervisors call ready, ejected ones included. The owner sets it.
    """

    def __init__(self, settings: Outliers, rng: random.Random) -> None:
        self.ready = 0
        self._settings = settings
        self._random = rng.random
        self._circuits: dict[str, Circuit] = {}
        self._out: dict[str, Circuit] = {}

    def circuit(self, identifier: str) -> Circuit:
        """The circuit of an endpoint, made when it is new."""
        found = self._circuits.get(identifier)
        if found is None:
            found = self._circuits[identifier] = Circuit(identifier)
        return found

    def forget(self, identifier: str) -> None:
        """An endpoint has left."""
        self._circuits.pop(identifier, None)
        self._out.pop(identifier, None)

    def _has_left(self, circuit: Circuit) -> bool:
        """What was sent to it before may still be answered; another one may have its name by now."""
        return self._circuits.get(circuit.id) is not circuit

    @property
    def out(self) -> int:
        """Endpoints that are ejected or on probation."""
        return len(self._out)

    def succeeded(self, circuit: Circuit, now: float) -> bool:
        """An attempt succeeded; returns whether the endpoint's limit changed."""
        if circuit.state is State.CLOSED:
            if circuit.failures or circuit.ejections:
                self._settle(circuit, now)
            return False
        if circuit.state is State.OPEN or self._has_left(circuit):
            return False  # it was sent before
        circuit.probed += 1
        if circuit.probed >= self._settings.probes:
            circuit.state = State.CLOSED
            circuit.closed_at = now
            circuit.clear(now)
            del self._out[circuit.id]
        return True

    def _settle(self, circuit: Circuit, now: float) -> None:
        circuit.in_row = circuit.connects = 0
        circuit.count(now, self._settings.window_seconds, failed=False)
        if circuit.ejections and now - circuit.closed_at >= self._duration(circuit.ejections):
            circuit.ejections = 0

    def failed(self, circuit: Circuit, failure: Failure, now: float) -> bool:
        """An attempt failed; returns whether the endpoint's limit changed."""
        if self._has_left(circuit):
            return False
        if circuit.state is State.HALF_OPEN:
            self._open(circuit, failure, now)
            return True
        if circuit.state is State.OPEN:
            return False
        settings = self._settings
        circuit.count(now, settings.window_seconds, failed=True)
        circuit.in_row += 1
        circuit.connects = circuit.connects + 1 if failure is Failure.CONNECT else 0
        sick = (
            circuit.in_row >= settings.consecutive_failures
            or circuit.connects >= settings.consecutive_connects
            or (
                circuit.attempts >= settings.window_attempts
                and circuit.failures >= settings.failure_share * circuit.attempts
            )
        )
        # Where nothing listens there is nothing to doubt: only the last endpoint is still tried.
        allowed = self._most() if failure is Failure.CONNECT else self._allowed()
        if not sick or len(self._out) >= allowed:
            return False
        self._open(circuit, failure, now)
        return True

    def sweep(self, now: float) -> list[Circuit]:
        """Puts on probation whose ejection is over, or who would be missed; returns them."""
        if not self._out:
            return []
        changed = []
        ejected = sorted(
            (circuit for circuit in self._out.values() if circuit.state is State.OPEN),
            key=lambda circuit: (circuit.reason is Failure.CONNECT, circuit.until),
        )
        doubtful = sum(circuit.reason is not Failure.CONNECT for circuit in ejected)
        excess = max(doubtful - self._allowed(), len(ejected) - self._most())
        for number, circuit in enumerate(ejected):
            if circuit.until <= now or number < excess:
                circuit.state = State.HALF_OPEN
                circuit.probed = 0
                changed.append(circuit)
        return changed

    def _allowed(self) -> int:
        return min(max(1, int(self._settings.max_ejected_share * self.ready)), self._most())

    def _most(self) -> int:
        return max(0, self.ready - 1)

    def _open(self, circuit: Circuit, failure: Failure, now: float) -> None:
        circuit.ejections += 1
        circuit.state = State.OPEN
        circuit.reason = failure
        circuit.until = now + self._duration(circuit.ejections) * (1 + 0.2 * self._random())
        circuit.clear(now)
        self._out[circuit.id] = circuit

    def _duration(self, ejections: int) -> float:
        settings = self._settings
        return min(settings.longest_ejection, settings.base_ejection * 2.0 ** min(ejections - 1, 30))


class RetryBudget:
    """How many retries a model's traffic may add: a share of its requests, and a few a second in any case.

    Without it a fault that hits all endpoints multiplies the load on them by the number of attempts.

    Args:
        share: Retries per request.
        per_second: Retries a second that are allowed however few requests there are.
        window: Seconds over which the past fades.
    """

    __slots__ = ("_balance", "_last", "_per_second", "_refilled", "_reserve", "_share", "_window")

    def __init__(self, share: float = 0.2, per_second: float = 3.0, window: float = 10.0) -> None:
        self._share = share
        self._per_second = per_second
        self._window = window
        self._balance = 0.0
        self._reserve = per_second * window
        self._last = self._refilled = _NEVER

    def request(self, now: float) -> None:
        """A request came in."""
        self._balance = self._balance * math.exp((self._last - now) / self._window) + self._share
        self._last = now

    def take(self, now: float) -> bool:
        """Takes one retry from the budget; ``False`` when it is spent."""
        balance = self._balance * math.exp((self._last - now) / self._window)
        if balance >= 1:
            self._balance = balance - 1
            self._last = now
            return True
        full = self._per_second * self._window
        self._reserve = min(full, self._reserve + (now - self._refilled) * self._per_second)
        self._refilled = now
        if self._reserve < 1:
            return False
        self._reserve -= 1
        return True
