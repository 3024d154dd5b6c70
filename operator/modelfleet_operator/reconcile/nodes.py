"""What a pool has: the groups as declared, with the nodes that are alive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from modelfleet_operator.api import AcceleratorGroup, ServingPool
from modelfleet_operator.api.status import AcceleratorStatus
from modelfleet_operator.catalog.accelerators import accelerator
from modelfleet_operator.planner import NodeCapacity, PoolView
from modelfleet_operator.planner.inputs import node_template, pool_view, ray_resource

NodeResources = Mapping[str, float]


def alive_by_group(pool: ServingPool, nodes: Iterable[NodeResources]) -> dict[str, int]:
    """Nodes that are alive, by accelerator type.

    Args:
        pool: the pool.
        nodes: Ray resources of each node.
    """
    found = dict.fromkeys((group.type for group in pool.spec.accelerators), 0)
    for resources in nodes:
        group = next((g for g in pool.spec.accelerators if _is_of(g, resources)), None)
        if group is not None:
            found[group.type] += 1
    return found


def _is_of(group: AcceleratorGroup, resources: NodeResources) -> bool:
    if ray_resource(group.type) in resources:
        return True
    known = accelerator(group.type)
    if known is not None and known.is_cpu:
        return not resources.get("GPU") and bool(resources.get("CPU"))
    ray_type = known.ray_type if known else None
    return bool(resources.get("GPU")) and ray_type is not None and f"accelerator_type:{ray_type}" in resources


def observed_view(
    pool: ServingPool, alive: Mapping[str, int] | None, pending: frozenset[str] = frozenset()
) -> PoolView:
    """The pool for the planner.

    Args:
        pool: the pool.
        alive: nodes by accelerator type; ``None`` while nobody knows: then as declared.
        pending: accelerator types that were asked for and did not come in time.
    """
    declared = pool_view(pool)
    if alive is None:
        return declared
    groups = []
    for group in declared.groups:
        spec = pool.group(group.accelerator)
        assert spec is not None  # noqa: S101  the view is made of the pool
        count, node = alive.get(group.accelerator, 0), node_template(spec)
        groups.append(
            replace(
                group,
                nodes=(NodeCapacity(node.gpus, node.cpus, node.memory_gib, count),) if count else (),
                obtainable_nodes=max(spec.max_nodes - count, 0),
                pending_too_long=group.accelerator in pending,
            )
        )
    return PoolView(tuple(groups))


def accelerator_rows(
    pool: ServingPool, alive: Mapping[str, int] | None, used: Mapping[str, float]
) -> list[AcceleratorStatus]:
    """What there is and what is free, by accelerator; nodes are counted where they have none (CPU).

    Args:
        pool: the pool.
        alive: nodes by accelerator type; ``None`` while nobody knows.
        used: accelerators that replicas hold.
    """
    rows = []
    for group in pool.spec.accelerators:
        each = group.gpus_per_node or 1
        nodes = (alive or {}).get(group.type, 0)
        total, taken = nodes * each, min(round(used.get(group.type, 0.0)), nodes * each)
        rows.append(
            AcceleratorStatus(
                type=group.type,
                total=total,
                used=taken,
                free=total - taken,
                obtainable=max(group.max_nodes - nodes, 0) * each,
            )
        )
    return rows


def free_column(rows: Sequence[AcceleratorStatus]) -> str:
    """``A10 3/8, T4 0/4``: free of all that there are or may be."""
    return ", ".join(f"{row.type} {row.free + row.obtainable}/{row.total + row.obtainable}" for row in rows)
