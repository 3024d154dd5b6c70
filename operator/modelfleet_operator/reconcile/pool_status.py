"""What the administrator reads of a pool: conditions and accelerators."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from modelfleet_operator.api import ServingPool
from modelfleet_operator.api.status import AcceleratorStatus, Condition, ServingPoolStatus
from modelfleet_operator.catalog.accelerators import accelerator
from modelfleet_operator.reconcile.conditions import Finding, with_times
from modelfleet_operator.reconcile.nodes import free_column

USED_BY_LIMIT = 4096
_NAMED = 10


@dataclass(frozen=True)
class Trouble:
    """What keeps a Ray cluster from being used."""

    reason: str
    message: str


def cluster_finding(*, connected: bool, trouble: Trouble | None) -> Finding:
    """``ClusterReady``.

    Args:
        connected: whether Ray answered the last call.
        trouble: what is in the way; beside a Ray that answers: of the cluster as it shall be.
    """
    if connected:
        behind = f", but the cluster is not as it shall be: {trouble.message}" if trouble else ""
        return Finding("ClusterReady", "True", "RayAnswers", f"Ray Serve answers{behind}")
    if trouble is not None:
        return Finding("ClusterReady", "False", trouble.reason, trouble.message)
    return Finding("ClusterReady", "Unknown", "Connecting", "Ray has not answered yet")


def registry_finding(*, connected: bool, warming: bool, cluster: Finding) -> Finding:
    """``RegistryReady``."""
    if connected and not warming:
        return Finding("RegistryReady", "True", "RegistryAnswers", "the registry answers")
    if connected:
        return Finding(
            "RegistryReady", "Unknown", "Warming", "the registry has just started and collects reports"
        )
    if cluster.status != "True":
        return Finding("RegistryReady", "Unknown", cluster.reason, "the registry runs in the Ray cluster")
    return Finding("RegistryReady", "False", "RegistryUnreachable", "the registry does not answer")


def ready_finding(cluster: Finding, registry: Finding, deleting: bool, users: Sequence[str]) -> Finding:
    """``Ready``: whether models can be run and routed."""
    if deleting and users:
        return Finding("Ready", "False", "InUse", in_use_message(users))
    if deleting:
        return Finding("Ready", "False", "Deleting", "the pool is being deleted")
    for finding in (cluster, registry):
        if finding.status != "True":
            return Finding("Ready", finding.status, finding.reason, finding.message)
    return Finding("Ready", "True", "PoolReady", "the pool runs models")


def in_use_message(users: Sequence[str]) -> str:
    """Who keeps a pool from being deleted."""
    more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
    return f"the pool is used by {', '.join(sorted(users)[:_NAMED])}{more}: delete or move them first"


def refused_pool(reason: str, message: str) -> tuple[Finding, ...]:
    """Conditions of a pool that can't be accepted."""
    return (
        Finding("Accepted", "False", reason, message),
        Finding("ClusterReady", "Unknown", "NotAccepted"),
        Finding("RegistryReady", "Unknown", "NotAccepted"),
        Finding("Ready", "False", reason, message),
    )


def pool_status(
    generation: int,
    findings: Sequence[Finding],
    before: Sequence[Condition],
    now: str,
    *,
    address: str | None = None,
    registry: str | None = None,
    accelerators: Sequence[AcceleratorStatus] = (),
    used_by: Collection[str] = (),
) -> ServingPoolStatus:
    """The whole status."""
    ready = next(f for f in findings if f.type == "Ready")
    return ServingPoolStatus(
        conditions=with_times(findings, before, generation, now),
        observed_generation=generation,
        address=address,
        registry=registry,
        ready=ready.status,
        accelerators=list(accelerators),
        free=free_column(accelerators) or None,
        used_by=sorted(used_by)[:USED_BY_LIMIT],
    )


def accepted_pool(pool: ServingPool) -> Finding:
    """``Accepted`` of a pool that the schema lets through."""
    message = f"{len(pool.spec.accelerators)} accelerator groups"
    if unknown := [g.type for g in pool.spec.accelerators if accelerator(g.type) is None]:
        message += f"; the catalogue has no {', '.join(unknown)}: only the simulator is planned there"
    return Finding("Accepted", "True", "Valid", message)
