"""Conditions: one function owns their transition times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from modelfleet_operator.api import Condition

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Finding:
    """A condition without times."""

    type: str
    status: Truth
    reason: str
    message: str = ""


def with_times(
    findings: Sequence[Finding], before: Sequence[Condition], generation: int, now: str
) -> list[Condition]:
    """Conditions of findings; the transition time moves only when the status flips.

    Args:
        findings: what holds now.
        before: the conditions that stand in status.
        generation: of the spec that the findings are about.
        now: RFC 3339.
    """
    old = {c.type: c for c in before}
    result = []
    for finding in findings:
        previous = old.get(finding.type)
        same = previous is not None and previous.status == finding.status
        result.append(
            Condition(
                type=finding.type,
                status=finding.status,
                observed_generation=generation,
                last_transition_time=previous.last_transition_time if previous and same else now,
                reason=finding.reason,
                message=finding.message,
            )
        )
    return result
