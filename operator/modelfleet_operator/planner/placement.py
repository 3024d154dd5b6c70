"""Placing variants on a pool: preference, cost, what is free; never two plans for the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modelfleet_operator.planner.capacity import GroupCapacity
from modelfleet_operator.planner.sizing import pack_variant, size_variant
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
from modelfleet_operator.planner.unseen import Sized


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
        ranked = sorted(candidates, key=lambda c: c[1].plan.cost)
        plans = tuple(replace(c[1].plan, cost_rank=rank) for rank, c in enumerate(ranked, 1))
        ranks = {id(c[1]): plan.cost_rank for c, plan in zip(ranked, plans, strict=True)}
        ordered = candidates if self.request.accelerators else ranked
        if self.request.current is not None:
            ordered = sorted(ordered, key=lambda c: c[1].plan.accelerator != self.request.current)
        for preference, sized in ordered:
            placed = self._place_whole_or_packed(preference, sized)
            if placed is not None:
                chosen = replace(placed, cost_rank=ranks[id(sized)])
                return PlanResult(chosen, tuple(self.rejections), plans, message=self._placed(chosen))
        return self._refused(plans)

    def _candidates(self) -> list[tuple[AcceleratorPreference, Sized]]:
        preferences = self.request.accelerators or tuple(AcceleratorPreference(name) for name in self.groups)
        found = []
        for preference in preferences:
            group = self.groups.get(preference.type)
            if group is None:
                text = f"the pool has no {preference.type}"
                self.rejections.append(Rejection(preference.type, Rule.NOT_IN_POOL, text))
                continue
            sized = size_variant(self.request, preference, group)
            if isinstance(sized, Sized):
                found.append((preference, sized))
            else:
                self.rejections.append(sized)
        return found

    def _place_whole_or_packed(self, preference: AcceleratorPreference, sized: Sized) -> VariantPlan | None:
        capacity = self.capacity[sized.plan.accelerator]
        now = self._place(sized, capacity)
        if now is not None:
            return replace(sized.plan, placed_now=now)
        packed = pack_variant(self.request, preference, capacity.group, sized.plan)
        if packed is not None:
            now = self._place(packed, capacity)
            if now is not None:
                return replace(packed.plan, placed_now=now)
        self.rejections.append(self._none_free(sized, capacity))
        return None

    def _place(self, sized: Sized, capacity: GroupCapacity) -> int | None:
        """Reserve the replicas; how many running nodes take, or ``None`` where not all fit."""
        before, left = capacity.nodes.copy(), capacity.obtainable
        now = 0
        for _ in range(max(self.request.replicas, 1)):
            outcome = capacity.place(sized.demand)
            if outcome is None:
                capacity.nodes, capacity.obtainable = before, left
                return None
            now += outcome
        if self.request.replicas == 0:  # only asked whether one could run: nothing is held
            capacity.nodes, capacity.obtainable = before, left
            return 0
        return now

    def _none_free(self, sized: Sized, capacity: GroupCapacity) -> Rejection:
        name, demand = sized.plan.accelerator, sized.demand
        replicas = max(self.request.replicas, 1)
        each = (
            f"{demand.gpus:g} x {name}"
            if demand.gpus
            else f"{demand.cpus:g} cores and {demand.memory_gib:.1f} GiB"
        )
        if demand.nodes > 1:
            each = f"{demand.nodes} nodes with {each}"
        need = f"{replicas} x ({each})" if replicas > 1 else each
        if capacity.group.pending_too_long and capacity.group.obtainable_nodes:
            text = f"{need} asked for: the new nodes did not come in time"
            return Rejection(name, Rule.PENDING_TOO_LONG, text, retryable=True)
        if capacity.whole().place(demand) is None:
            return Rejection(name, Rule.NODE_TOO_SMALL, f"no {name} node has {each} in all")
        return Rejection(name, Rule.NONE_FREE, f"{need} are not free and can't be added", retryable=True)

    def _placed(self, plan: VariantPlan) -> str:
        waiting = max(self.request.replicas - plan.placed_now, 0)
        return f"{waiting} of {self.request.replicas} replicas wait for new nodes" if waiting else ""

    def _refused(self, candidates: tuple[VariantPlan, ...]) -> PlanResult:
        if not self.rejections:
            return PlanResult(None, (), candidates, str(Rule.NOT_IN_POOL), "the pool has no accelerators")
        # What holds everywhere is said once; otherwise what is said last came closest to running.
        messages = {r.message for r in self.rejections}
        if len(messages) == 1:
            return PlanResult(
                None, tuple(self.rejections), candidates, str(self.rejections[0].rule), messages.pop()
            )
        message = "; ".join(f"{r.accelerator}: {r.message}" for r in self.rejections)
        return PlanResult(None, tuple(self.rejections), candidates, str(self.rejections[-1].rule), message)
