"""A ModelDeployment that is suspended: it keeps its name and its plan, and nothing of it runs.

Its conditions say that this is meant so. `Ready` holds, as everything that was asked for is in place: nobody
who waits for it takes the pause for a fault. `Serving` does not, as requests are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from modelfleet_operator.api import VariantStatus
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reconcile.observed import Observed

SUSPENDED: Final = "Suspended"
"""Condition, and the reason of the others."""
_REFUSED: Final = "spec.suspend is true: requests are answered 503 until it is not"


def is_draining(observed: Observed) -> bool:
    """Whether something of it is still there."""
    return any(
        seen.application is not None or seen.endpoints
        for revisions in observed.variants.values()
        for seen in revisions.values()
    )


def suspended_rows(rows: Sequence[VariantStatus]) -> tuple[VariantStatus, ...]:
    """Rows of variants that don't run on purpose; what keeps one from running later is told as ever."""
    return tuple(
        row.model_copy(update={"reason": SUSPENDED, "message": "" if row.accelerator else row.message})
        for row in rows
    )


def suspended_findings(findings: Sequence[Finding], observed: Observed) -> tuple[Finding, ...]:
    """Conditions of a ModelDeployment that is suspended."""
    draining = is_draining(observed)
    said = {
        "Progressing": Finding("Progressing", "True", "Draining", "running requests end first")
        if draining
        else Finding("Progressing", "False", "Complete"),
        "Serving": Finding("Serving", "False", SUSPENDED, _REFUSED),
        SUSPENDED: Finding(SUSPENDED, "True", SUSPENDED, "spec.suspend is true"),
        "Ready": Finding("Ready", "True", SUSPENDED, "nothing runs, as spec.suspend asks"),
    }
    return tuple(said.get(f.type, f) for f in findings)
