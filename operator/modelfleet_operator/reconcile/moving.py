"""What users read of a ModelDeployment that moves to another pool while the one before still serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from modelfleet_operator.reconcile.conditions import Finding

MOVING: Final = "MovingPool"


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether everything that was asked for is in place."""
    return any(f.type == "Ready" and f.status == "True" for f in findings)


def said_while_moving(
    findings: Sequence[Finding], answers: Mapping[str, bool | None], pool: str
) -> tuple[Finding, ...]:
    """Conditions of the new pool, with what those before it do meanwhile.

    Args:
        findings: of the new pool.
        answers: by pool before it, as ``namespace/name``, whether it answers; ``None``: nobody knows.
        pool: the new one.
    """
    said = {
        "Progressing": Finding(
            "Progressing", "True", MOVING, f"from pool {', '.join(answers)} to pool {pool}"
        )
    }
    serving = ", ".join(name for name, answer in answers.items() if answer)
    if serving:
        text = f"in pool {serving} (until pool {pool} serves)"
        said["Serving"] = Finding("Serving", "True", "EndpointsReady", text)
    elif None in answers.values():
        text = f"the registry of pool {', '.join(answers)} can't be reached or has just started"
        said["Serving"] = Finding("Serving", "Unknown", "RegistryUnavailable", text)
    return tuple(f if f.type == "Serving" and f.status == "True" else said.get(f.type, f) for f in findings)
