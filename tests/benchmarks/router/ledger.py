"""The soak's account: every request sent, what became of it, and which fault explains what went wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

QUIET = "no fault"

# What a client may see of each fault. A replica's fault before the first byte is the router's to mend, by
# trying another one: the client sees an error only when that failed too. After the first byte it sees an
# error in its stream. Only the death of the router process itself may cut an answer off.
_ERRORS = frozenset({"http_error", "stream_error"})
_CUT = frozenset({"http_error", "stream_error", "truncated", "no_answer", "refused"})
EXPLAINS = {
    "replica killed": _ERRORS,
    "replica stalled": _ERRORS,
    "replica answers 500": _ERRORS,
    "replica resets": _ERRORS,
    "replica cuts streams": _ERRORS,
    "replica drained": frozenset[str](),
    "table changed": frozenset[str](),
    "router restarted": frozenset[str](),
    "worker killed": _CUT,
}
CLEAR_STATUSES = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Fault:
    """One injected fault. Times in microseconds, monotonic; ``end`` includes what it still explains."""

    kind: str
    target: str
    begin: int
    end: int


@dataclass(frozen=True)
class Entry:
    """One request of the generator's ledger."""

    id: str
    begin: int
    end: int
    outcome: str
    status: int
    chunks: int
    replica: str
    resent: bool
    note: str


@dataclass
class Account:
    """The sum of it."""

    sent: int = 0
    answered: int = 0
    table: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By fault: what became of the requests that met it."""
    unexplained: list[Entry] = field(default_factory=list)
    repeated_ids: int = 0
    executed: Counter[int] = field(default_factory=Counter)
    """How many requests reached engines once, twice, ..."""
    repeated_without_fault: list[str] = field(default_factory=list)
    continued: int = 0
    never_executed: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Requests that ended in a clear error."""
        return self.sent - self.answered

    def complete(self, arrivals: int) -> bool:
        """Whether every request that arrived is in the ledger, once, with an answer or an explained error."""
        return self.sent == arrivals and not (self.repeated_ids or self.unexplained or self.never_executed)


def read_entries(path: Path) -> Iterator[Entry]:
    """The generator's ledger."""
    with path.open() as lines:
        for line in lines:
            ident, begin, end, outcome, status, chunks, replica, resent, note = line.rstrip("\n").split("\t")
            yield Entry(
                ident, int(begin), int(end), outcome, int(status), int(chunks), replica, resent == "1", note
            )


def read_executions(paths: Iterable[Path]) -> dict[str, list[int]]:
    """From the engines' logs: for each request id, the place in the stream that each execution began at."""
    executions: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        with path.open() as lines:
            for line in lines:
                parts = line.split()
                if len(parts) == 4:  # a killed engine may leave half a line
                    executions[parts[0]].append(int(parts[2]))
    return executions


def account(entries: Iterable[Entry], executions: dict[str, list[int]], faults: Sequence[Fault]) -> Account:
    """Assigns every request to the faults that it met, and every error to one that explains it."""
    result = Account()
    seen: set[str] = set()
    for entry in entries:
        result.sent += 1
        result.repeated_ids += entry.id in seen
        seen.add(entry.id)
        met = [fault for fault in faults if fault.begin <= entry.end and entry.begin <= fault.end]
        runs = executions.get(entry.id, [])
        result.executed[len(runs)] += 1
        result.continued += any(runs)
        if entry.outcome == "ok":
            result.answered += 1
            if not runs:
                result.never_executed.append(entry.id)
        if len(runs) > 1 and not met:
            result.repeated_without_fault.append(entry.id)
        fault = _explanation(entry, met)
        if fault is None and entry.outcome != "ok":
            result.unexplained.append(entry)
        kind = fault.kind if fault else met[0].kind if met else QUIET
        row = result.table[kind]
        row["requests"] += 1
        row["http_error " + str(entry.status) if entry.outcome == "http_error" else entry.outcome] += 1
        row["tried again"] += len(runs) > 1
        row["continued"] += any(runs)
        row["resent"] += entry.resent
    return result


def _explanation(entry: Entry, met: Sequence[Fault]) -> Fault | None:
    if entry.outcome == "ok":
        return None
    if entry.outcome == "http_error" and entry.status not in CLEAR_STATUSES:
        return None
    return next((fault for fault in met if entry.outcome in EXPLAINS[fault.kind]), None)
