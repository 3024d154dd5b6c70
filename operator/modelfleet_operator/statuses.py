"""Composes the statuses that the fleet writes: what a pool's controller says, and refusals.

Each is composed anew from the status that stands there when it is written: conditions keep their times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from modelfleet_operator.api import Condition, ModelDeployment, ModelDeploymentStatus, VariantStatus
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, SERVING_POOL
from modelfleet_operator.reconcile.conditions import Finding, with_times
from modelfleet_operator.reconcile.pool_status import pool_status, refused_pool
from modelfleet_operator.reconcile.status import deployment_status, first_status, refused_status
from modelfleet_operator.seen import SeenDeployment, SeenPool, address_of, key_of
from modelfleet_operator.writer import ObjectWriter

_MAX_MESSAGE: Final = 8000


def set_first_status(writer: ObjectWriter, deployment: ModelDeployment) -> None:
    """Say that a valid ModelDeployment was seen, before anything is known of it."""

    def compose(now: str, before: dict[str, Any]) -> dict[str, Any]:
        conditions = [Condition.model_validate(c) for c in before.get("conditions", ())]
        return deployment_status(deployment, (), first_status(), conditions, now).to_dict()

    writer.set_status(address_of(MODEL_DEPLOYMENT, deployment.key), compose, passing=True)


def set_deployment_status(
    writer: ObjectWriter,
    deployment: ModelDeployment,
    rows: Sequence[VariantStatus],
    findings: Sequence[Finding],
    pool: str | None = None,
) -> None:
    """Say what was decided for a ModelDeployment.

    Args:
        writer: to the API server.
        deployment: the resource.
        rows: of its variants.
        findings: its conditions without times.
        pool: that serves it, as ``namespace/name``; default what the status says.
    """

    def compose(now: str, before: dict[str, Any]) -> dict[str, Any]:
        old = ModelDeploymentStatus.model_validate(before)
        current = old if old.observed_generation == deployment.metadata.generation else None
        status = deployment_status(deployment, rows, findings, old.conditions, now, current)
        return status.model_copy(update={"pool": pool or old.pool}).to_dict()

    moving = any(f.type == "Progressing" and f.status == "True" for f in findings)
    writer.set_status(address_of(MODEL_DEPLOYMENT, deployment.key), compose, passing=moving)


def refuse_deployment(writer: ObjectWriter, entry: SeenDeployment, reason: str, message: str) -> None:
    """Say why a ModelDeployment is not accepted; the rest of a status that can't be understood stays."""
    text = message[:_MAX_MESSAGE]
    if entry.parsed is not None and not entry.problems:
        set_deployment_status(writer, entry.parsed, (), refused_status(entry.parsed, reason, text))
        return
    key = key_of(entry.body)
    generation = entry.body["metadata"].get("generation", 0)
    findings = refused_status(key, reason, text)

    def compose(now: str, before: dict[str, Any]) -> dict[str, Any]:
        conditions = [Condition.model_validate(c) for c in before.get("conditions", ())]
        timed = with_times(findings, conditions, generation, now)
        return {**before, "conditions": [c.to_dict() for c in timed], "observedGeneration": generation}

    writer.set_status(address_of(MODEL_DEPLOYMENT, key), compose)


def refuse_pool(writer: ObjectWriter, pool: SeenPool, reason: str, message: str) -> None:
    """Say why a ServingPool is not accepted."""
    generation = pool.body["metadata"].get("generation", 0)

    def compose(now: str, before: dict[str, Any]) -> dict[str, Any]:
        conditions = [Condition.model_validate(c) for c in before.get("conditions", ())]
        return pool_status(generation, refused_pool(reason, message), conditions, now).to_dict()

    writer.set_status(address_of(SERVING_POOL, key_of(pool.body)), compose)
