"""What a process knows of its right to write.

The Lease says who leads, but a leader that can't reach the API server can't read it. Each leadership has a
number, the Lease's count of transitions, which goes with everything that is said to a registry: it obeys the
highest that it has heard of, and no other.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from modelfleet_operator.metrics import ERRORS

log = logging.getLogger(__name__)


@dataclass
class Leadership:
    """One process's.

    Attributes:
        term: number of its leadership; ``None`` without leader election.
        cut_off: whether the API server can't be reached: another may lead without our knowing.
        newest: the highest term that a registry has told of.
    """

    term: int | None = None
    cut_off: bool = False
    newest: int = -1

    @property
    def superseded(self) -> bool:
        """Whether a later leader is known to have taken over: nothing may be written."""
        return self.term is not None and self.newest > self.term

    def heard_of(self, term: int | None) -> None:
        """A registry has heard of this term."""
        if term is None or term <= self.newest:
            return
        self.newest = term
        if self.superseded:
            ERRORS.labels(reason="Superseded").inc()
            log.warning("the leader of term %s is at work, not of %s: nothing is written", term, self.term)

    def next_term(self, written: int, *, renewed: bool) -> int:
        """The term to write into the Lease.

        A holder that is told of a later term is right all the same: the Lease was made anew, or restored from
        a backup. Then it goes ahead of what the registries know.

        Args:
            written: what the Lease says.
            renewed: whether this process holds it already.
        """
        return max(written if renewed else written + 1, self.newest + 1 if self.superseded else 0)
