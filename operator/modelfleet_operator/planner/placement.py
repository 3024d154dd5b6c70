"""Placing several variants on one pool: preference, cost, what is free; never two plans for the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modelfleet_operator.planner.capacity import GroupCapacity
from modelfleet_operator.planner.sizing import Sized, size_variant
from modelfleet_operator.planner.types import (
    AcceleratorGroup,
    AcceleratorPreference,
    PlanResult,
    PoolView,
    Rejection,
    Rule,
    VariantPlan,
    VariantRequest,
)


def plan_variant(request: VariantRequest, pool: PoolView) -> PlanResult:
    """Plan one variant on an otherwise empty plan of the pool."""
    return plan_all({"": request}, pool)[""]


def plan_all(requests: Mapping[str, VariantRequest], pool: PoolView) -> dict[str, PlanResult]:
    """Plan variants together.

    Variants that run already are placed first, where they run; the others follow in the mapping's order.

    Args:
        requests: by a key of the caller's choice.
        pool: what there is, without the share of the variants asked about.
    """
    capacity = {group.accelerator: GroupCapacity.of(group) for group in pool.groups}
    order = sorted(requests, key=lambda key: requests[key].current is None)
    results = {key: _Placement(requests[key], pool, capacity).run() for key in order}
    return {key: results[key] for key in requests}


class _Placement:
    """Placing one variant."""

    def __init__(self, request: VariantRequest, pool: PoolView, capacity: dict[str, GroupCapacity]) -> None:
        self.request = request
        self.groups: dict[str, AcceleratorGroup] = {group.accelerator: group for group in pool.groups}
        self.capacity = capacity
        self.rejections: list[Rejection] = []

    def run(self) -> PlanResult:
        candidates = self._candidates()
        ranked = sorted(candidates, key=lambda c: c.plan.cost)
        ranks = {id(c): i + 1 for i, c in enumerate(ranked)}
        plans = {id(c): replace(c.plan, cost_rank=ranks[id(c)]) for c in candidates}
        ordered = candidates if self.request.accelerators else ranked
        if self.request.current is not None:
            ordered = sorted(ordered, key=lambda c: c.plan.accelerator != self.request.current)
        chosen: VariantPlan | None = None
        for sized in ordered:
            placed = self._place(sized)
            if placed is not None:
                chosen = replace(plans[id(sized)], placed_now=placed)
                break
        listed = tuple(plans[id(c)] for c in ranked)
        if chosen is not None:
            return PlanResult(chosen, tuple(self.rejections), listed)
        return self._refused(listed)

    def _candidates(self) -> list[Sized]:
        preferences = self.request.accelerators or tuple(AcceleratorPreference(name) for name in self.groups)
        found = []
        for preference in preferences:
            group = self.groups.get(preference.type)
            if group is None:
                self.rejections.append(
                    Rejection(preference.type, Rule.NOT_IN_POOL, f"the pool has no {preference.type}")
                )
                continue
            sized = size_variant(self.request, preference, group)
            if isinstance(sized, Sized):
                found.append(sized)
            else:
                self.rejections.append(sized)
        return found

    def _place(self, sized: Sized) -> int | None:
        """Reserve the replicas; how many running nodes take, or ``None`` where not all fit."""
        capacity = self.capacity[sized.plan.accelerator]
        before, left = capacity.nodes.copy(), capacity.obtainable
        now = 0
        for _ in range(max(self.request.replicas, 1)):
            outcome = capacity.place(sized.demand)
            if outcome is None:
                capacity.nodes, capacity.obtainable = before, left
                self.rejections.append(self._none_free(sized, capacity))
                return None
            now += outcome
        if self.request.replicas == 0:
            capacity.nodes, capacity.obtainable = before, left
            return 0
        return now

    def _none_free(self, sized: Sized, capacity: GroupCapacity) -> Rejection:
        name = sized.plan.accelerator
        need = (
            f"{sized.demand.gpus:g} x {name}"
            if sized.demand.gpus
            else f"{sized.demand.memory_gib:.1f} GiB of a CPU node"
        )
        if capacity.group.pending_too_long:
            return Rejection(
                name, Rule.PENDING_TOO_LONG, f"{need} asked for did not come in time", retryable=True
            )
        return Rejection(name, Rule.NONE_FREE, f"{need} are not free and can't be added", retryable=True)

    def _refused(self, candidates: tuple[VariantPlan, ...]) -> PlanResult:
        last = self.rejections[-1] if self.rejections else None
        reason = str(last.rule) if last else str(Rule.NOT_IN_POOL)
        message = "; ".join(f"{r.accelerator}: {r.message}" for r in self.rejections) or "the pool is empty"
        return PlanResult(None, tuple(self.rejections), candidates, reason, message)
