"""Placing variants on a pool: preference, cost, what is free; never two plans for the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from typing import Final

import msgspec

from modelfleet_operator.catalog.accelerators import accelerator
from modelfleet_operator.planner.capacity import GroupCapacity
from modelfleet_operator.planner.facts import AttentionKind, ModelFacts, ModelUnavailable
from modelfleet_operator.planner.sizing import pack_variant, size_variant
from modelfleet_operator.planner.types import (
    SIMULATOR,
    AcceleratorGroup,
    AcceleratorPreference,
    PlanResult,
    PoolView,
    Rejection,
    Rule,
    VariantPlan,
    VariantRequest,
)
from modelfleet_operator.planner.unseen import Sized, cost_of

Sizes = dict[tuple[object, ...], Sized | Rejection]
"""Sizes of one round of planning, by what decides about them."""
SHOWN: Final = 8
"""Accelerators that a message names."""
SMALLEST_SHARE: Final = 0.05
"""Of an accelerator: the smallest step of a share."""


def plan_variant(request: VariantRequest, pool: PoolView) -> PlanResult:
    """Plan one variant on an otherwise empty plan of the pool."""
    return plan_all({"": request}, pool)[""]


def plan_all(requests: Mapping[str, VariantRequest], pool: PoolView) -> dict[str, PlanResult]:
    """Plan variants together.

    Variants that run already are placed first, where they run; the others follow in the mapping's order.
    Where some find nothing free, small ones that are new as well, and would take whole GPUs, share them
    instead: the last ones first, and as few as will do.

    Args:
        requests: by a key of the caller's choice.
        pool: what there is, without the share of the variants asked about.
    """
    sizes: Sizes = {}
    results = _plan_round(requests, pool, sizes, frozenset())
    movable = _movable(requests, results)
    number = 1
    while movable and _stuck(results):
        other = _plan_round(requests, pool, sizes, frozenset(movable[-number:]))
        if len(_stuck(other)) < len(_stuck(results)) and _stuck(other) <= _stuck(results):
            results = other
        if number >= len(movable):
            break
        number *= 2
    return results


def _plan_round(
    requests: Mapping[str, VariantRequest], pool: PoolView, sizes: Sizes, packed: frozenset[str]
) -> dict[str, PlanResult]:
    capacity = {group.accelerator: GroupCapacity.of(group) for group in pool.groups}
    order = sorted(requests, key=lambda key: requests[key].current is None)
    results = {key: _plan_one(requests[key], pool, capacity, sizes, packed=key in packed) for key in order}
    return {key: results[key] for key in requests}


def _stuck(results: Mapping[str, PlanResult]) -> set[str]:
    """What would run if more were free, or with more replicas."""
    return {key for key, result in results.items() if result.reason == Rule.NONE_FREE}


def _movable(requests: Mapping[str, VariantRequest], results: Mapping[str, PlanResult]) -> list[str]:
    """New variants on whole GPUs of a kind that others find none of."""
    short = {
        rejection.accelerator
        for key in _stuck(results)
        for rejection in results[key].rejections
        if rejection.rule is Rule.NONE_FREE
    }
    return [
        key
        for key, result in results.items()
        if requests[key].current is None
        and result.plan is not None
        and result.plan.accelerators_per_replica == 1
        and result.plan.accelerator in short
    ]


def _plan_one(
    request: VariantRequest,
    pool: PoolView,
    capacity: dict[str, GroupCapacity],
    sizes: Sizes,
    *,
    packed: bool,
) -> PlanResult:
    try:
        return _Placement(request, pool, capacity, sizes, packed=packed).run()
    except Exception as error:  # noqa: BLE001  one odd checkpoint must not keep all others from their plans
        text = f"the arithmetic fails on this checkpoint ({type(error).__name__}: {error}); please report it"
        return PlanResult(
            None, (Rejection("", Rule.PLANNER_FAILED, text),), (), str(Rule.PLANNER_FAILED), text
        )


def _alike(request: VariantRequest) -> tuple[object, ...]:
    """What decides about sizes; requests for one checkpoint share its facts: the object stands for them."""
    return (
        id(request.model),
        request.quantization,
        msgspec.json.encode(request.engine),
        request.task,
        request.adapters,
        request.notes,
        request.min_tokens,
        request.measurements,
    )


def _ranked(found: list[Sized]) -> tuple[VariantPlan, ...]:
    """Plans by cost, each with its rank."""
    ordered = sorted((sized.plan for sized in found), key=lambda plan: plan.cost)
    return tuple(replace(plan, cost_rank=rank) for rank, plan in enumerate(ordered, 1))


class _Placement:
    """Placing one variant. With ``packed`` it shares a GPU where it may, even if a whole one is free."""

    def __init__(
        self,
        request: VariantRequest,
        pool: PoolView,
        capacity: dict[str, GroupCapacity],
        sizes: Sizes,
        *,
        packed: bool,
    ) -> None:
        self.request = request
        self.packed = packed or request.current_percent is not None
        self.groups: dict[str, AcceleratorGroup] = {group.accelerator: group for group in pool.groups}
        self.capacity = capacity
        self.rejections: list[Rejection] = []
        self.sizes = sizes
        self.alike = _alike(request)
        self.asked: set[tuple[str, int | None]] = set()

    def run(self) -> PlanResult:
        model = self.request.model
        if self.request.engine.type != SIMULATOR and isinstance(model, ModelUnavailable) and not model.unseen:
            text = f"{model.reason}: {model.message}"
            refused = Rejection("", Rule.MODEL_UNAVAILABLE, text, retryable=model.retryable)
            return PlanResult(None, (refused,), (), str(refused.rule), text)
        seen: list[Sized] = []
        for preference, sized in self._in_order():
            seen.append(sized)
            plan = self._place_whole_or_packed(preference, sized)
            if plan is not None:
                # Those that are still to come were asked for as well: their cost ranks, too.
                seen += [s for p in self.request.accelerators for s in self._sized(p, quietly=True)]
                candidates = _ranked(seen)
                rank = next((c.cost_rank for c in candidates if c.accelerator == plan.accelerator), 1)
                chosen = replace(plan, cost_rank=rank)
                return PlanResult(chosen, tuple(self.rejections), candidates, message=self._placed(chosen))
        return self._place_some(seen) or self._refused(_ranked(seen))

    def _place_some(self, seen: list[Sized]) -> PlanResult | None:
        """As many replicas as there is room for, where it isn't for all: better than none."""
        replicas = self.request.replicas
        for sized in seen if replicas > 1 else ():
            capacity, placed = self.capacity[sized.plan.accelerator], 0
            while placed < replicas and capacity.place(sized.demand) is not None:
                placed += 1
            if not placed:
                continue
            name = sized.plan.accelerator
            text = f"{placed} of {replicas} replicas fit on {name}: the others wait for room"
            plan = replace(sized.plan, placed_now=placed)
            rejections = tuple(self.rejections)
            candidates = _ranked(seen)
            return PlanResult(plan, rejections, candidates, str(Rule.NONE_FREE), text, replicas - placed)
        return None

    def _in_order(self) -> Iterator[tuple[AcceleratorPreference, Sized]]:
        """Ways to run the variant: where it runs now, then as preferred, or the cheapest first."""
        asked = self.request.accelerators
        if not asked:
            yield from self._cheapest_first()
            return
        for preference in sorted(asked, key=lambda p: p.type != self.request.current):
            for sized in self._sized(preference):
                yield preference, sized

    def _cheapest_first(self) -> Iterator[tuple[AcceleratorPreference, Sized]]:
        """All accelerators of the pool by the cost of a replica.

        A replica costs at least one accelerator, so a group is sized only when its turn may have come.
        """
        floors = sorted(
            (self._floor(group), n, group.accelerator) for n, group in enumerate(self.groups.values())
        )
        ready: list[tuple[float, int, Sized]] = []
        for n, (floor, _, name) in enumerate(floors):
            while ready and ready[0][0] <= floor:
                sized = heappop(ready)[2]
                yield AcceleratorPreference(sized.plan.accelerator), sized
            for sized in self._sized(AcceleratorPreference(name)):
                cost = -1.0 if name == self.request.current else sized.plan.cost
                heappush(ready, (cost, n, sized))
        while ready:
            sized = heappop(ready)[2]
            yield AcceleratorPreference(sized.plan.accelerator), sized

    def _floor(self, group: AcceleratorGroup) -> float:
        if group.accelerator == self.request.current:
            return -1.0
        share = SMALLEST_SHARE if self._may_share() else 1.0
        return cost_of(group, accelerator(group.accelerator), 1.0) * share

    def _may_share(self) -> bool:
        """Whether a replica may be planned on less than a whole accelerator from the start."""
        model = self.request.model
        keeps_nothing = isinstance(model, ModelFacts) and all(
            a.kind is AttentionKind.ENCODER for a in model.attention
        )
        return keeps_nothing or self.request.engine.gpu_memory_percent is not None

    def _sized(self, preference: AcceleratorPreference, *, quietly: bool = False) -> Iterator[Sized]:
        key = (preference.type, preference.count)
        if key in self.asked:
            return
        self.asked.add(key)
        group = self.groups.get(preference.type)
        if group is None:
            text = f"the pool has no {preference.type}{self._what_there_is(preference.type)}"
            found: Sized | Rejection = Rejection(preference.type, Rule.NOT_IN_POOL, text)
        else:
            found = self._size(preference, group)
        if isinstance(found, Sized):
            yield found
        elif not quietly:
            self.rejections.append(found)

    def _what_there_is(self, asked: str) -> str:
        like = next((name for name in self.groups if name.casefold() == asked.casefold()), None)
        if like is not None:
            return f": write {like}"
        names = sorted(self.groups, key=lambda name: (accelerator(name) is None, name))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f", only {', '.join(names[:SHOWN])}{more}" if names else ""

    def _size(self, preference: AcceleratorPreference, group: AcceleratorGroup) -> Sized | Rejection:
        """The same variant on the same accelerator is sized once, however many deployments have it."""
        key = (*self.alike, preference.type, preference.count)
        if key not in self.sizes:
            self.sizes[key] = size_variant(self.request, preference, group)
        return self.sizes[key]

    def _place_whole_or_packed(self, preference: AcceleratorPreference, sized: Sized) -> VariantPlan | None:
        capacity = self.capacity[sized.plan.accelerator]
        for share in (True, False) if self.packed else (False, True):
            chosen = pack_variant(self.request, preference, capacity.group, sized.plan) if share else sized
            now = self._place(chosen, capacity) if chosen is not None else None
            if chosen is not None and now is not None:
                return replace(chosen.plan, placed_now=now)
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
