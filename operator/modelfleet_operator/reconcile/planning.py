"""Questions to the planner from what is wanted and what runs: only what changed is asked again.

Plans of a pool depend on one another through what is free. What is planned keeps its place, so a change asks
for the changed variants alone, against the pool less what all others hold; variants that found nothing free
are asked again when something was given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from modelfleet_operator.api import ModelDeployment, Variant
from modelfleet_operator.planner import (
    PlanResult,
    PoolView,
    VariantPlan,
    VariantRequest,
    plan_all,
)
from modelfleet_operator.planner.capacity import Demand, GroupCapacity
from modelfleet_operator.planner.inputs import Facts, variant_request
from modelfleet_operator.planner.types import AcceleratorGroup, AcceleratorPreference, NodeCapacity
from modelfleet_operator.reconcile.applications import ApplicationState, args_of, revision
from modelfleet_operator.reconcile.core import replicas_of
from modelfleet_operator.reconcile.observed import Observed
from modelfleet_serving.contract import ApplicationArgs

Key = tuple[str, str]
"""ModelDeployment and variant."""


@dataclass(frozen=True)
class _Held:
    """What a planned variant holds of an accelerator's group."""

    accelerator: str
    demand: Demand
    replicas: int


@dataclass
class PoolPlanner:
    """The plans of one pool, kept from step to step.

    Attributes:
        results: the planner's answers by ModelDeployment and variant.
        room: whether a second revision fits beside the running one, where one is due.
    """

    results: dict[str, dict[str, PlanResult]] = field(default_factory=dict)
    room: dict[str, dict[str, bool]] = field(default_factory=dict)
    _requests: dict[Key, VariantRequest] = field(default_factory=dict)
    _held: dict[Key, _Held] = field(default_factory=dict)
    _leaving: dict[str, dict[Key, _Held]] = field(default_factory=dict)
    """What removed variants still hold, by ModelDeployment."""
    _waiting: set[Key] = field(default_factory=set)
    _unplaced: set[Key] = field(default_factory=set)
    _view: PoolView = field(default_factory=lambda: PoolView(()))
    _freed: bool = False
    _moved: bool = False

    def set_view(self, view: PoolView, *, declared: bool) -> None:
        """Take over what the pool has.

        Args:
            view: the pool, with nothing of it in use.
            declared: what the administrator wrote has changed: every plan is looked at again. Otherwise
                nodes came or went, and only variants without a running replica are.
        """
        if view == self._view:
            return
        self._view = view
        if declared:
            self._requests.clear()
        else:
            self._moved = True

    def forget(self, key: str) -> None:
        """A ModelDeployment is gone: what it held is free."""
        self.room.pop(key, None)
        self._freed |= self._leaving.pop(key, None) is not None
        for variant in self.results.pop(key, {}):
            self._drop((key, variant))

    def plan(
        self, deployments: Mapping[str, ModelDeployment], facts: Facts, observed: Mapping[str, Observed]
    ) -> set[str]:
        """Bring the plans of these ModelDeployments up to date.

        Args:
            deployments: those that changed, in some way.
            facts: by source; sources that are not known yet may be missing.
            observed: what runs, by key.

        Returns:
            Keys whose plans changed; also of others than those given, which found room now.
        """
        asked: dict[Key, VariantRequest] = {}
        for key, deployment in deployments.items():
            seen = observed.get(key, Observed())
            names = {v.name for v in deployment.spec.variants}
            for gone in self.results.get(key, {}).keys() - names:
                del self.results[key][gone]
                self._drop((key, gone))
            self._hold_leaving(key, names, seen)
            for variant in deployment.spec.variants:
                request = _request(deployment, variant, facts, seen)
                pair = (key, variant.name)
                if request != self._requests.get(pair):
                    asked[pair] = request
                self._unplaced.discard(pair)
                if not any(r.ready for r in seen.revisions(variant.name).values()):
                    self._unplaced.add(pair)
        changed = self._ask(asked)
        left = cache(lambda: less(self._view, self._all_held()))
        for key, deployment in deployments.items():
            self.room[key] = self._room(deployment, observed.get(key, Observed()), left)
        return changed

    def _hold_leaving(self, key: str, names: Collection[str], observed: Observed) -> None:
        """Count what variants hold that the spec no longer has: it is theirs until they are gone."""
        holds = {}
        for name in observed.variants.keys() - names:
            for number, seen in observed.revisions(name).items():
                if seen.application is not None and (held := _held_by(seen.application)) is not None:
                    holds[key, f"{name}.{number}"] = held
        before = self._leaving.pop(key, {})
        self._freed |= bool(before.keys() - holds.keys())
        if holds:
            self._leaving[key] = holds

    def _all_held(self) -> list[_Held]:
        return [*self._held.values(), *(held for holds in self._leaving.values() for held in holds.values())]

    def _ask(self, asked: dict[Key, VariantRequest]) -> set[str]:
        for pair, request in asked.items():
            # What runs keeps its place while something more is read of it.
            if not request.reading and self._held.pop(pair, None) is not None:
                self._freed = True
        again = set(self._waiting) if self._freed or self._moved else set()
        if self._moved:
            again |= self._unplaced
        asked = {**{pair: self._requests[pair] for pair in again if pair in self._requests}, **asked}
        self._freed = self._moved = False
        if not asked:
            return set()
        for pair, request in asked.items():
            if not request.reading:
                self._held.pop(pair, None)
        # What runs is placed before what waits, by the planner itself.
        answers = _plan(asked, less(self._view, self._all_held()))
        changed = set()
        for pair, result in answers.items():
            key, name = pair
            before = self.results.setdefault(key, {}).get(name)
            self.results[key][name] = result
            self._requests[pair] = asked[pair]
            self._remember(pair, asked[pair], result)
            if before != result:
                changed.add(key)
        return changed

    def _remember(self, pair: Key, request: VariantRequest, result: PlanResult) -> None:
        self._waiting.discard(pair)
        if result.retryable:
            self._waiting.add(pair)
        placed = request.replicas - result.short
        if result.plan is not None and placed:
            self._held[pair] = _Held(result.plan.accelerator, demand_of(result.plan), placed)

    def _drop(self, pair: Key) -> None:
        self._requests.pop(pair, None)
        self._waiting.discard(pair)
        self._unplaced.discard(pair)
        if self._held.pop(pair, None) is not None:
            self._freed = True

    def _room(
        self, deployment: ModelDeployment, observed: Observed, left: Callable[[], PoolView]
    ) -> dict[str, bool]:
        room = {}
        for variant in deployment.spec.variants:
            result = self.results[deployment.key][variant.name]
            if _revision_is_due(deployment, variant, result, observed):
                room[variant.name] = self._fits_twice((deployment.key, variant.name), result, left)
        return room

    def _fits_twice(self, pair: Key, result: PlanResult, left: Callable[[], PoolView]) -> bool:
        if result.plan is None:
            return False
        preference = (AcceleratorPreference(result.plan.accelerator),)
        second = replace(self._requests[pair], accelerators=preference, current=None)
        return _plan({pair: second}, left())[pair].fits


def _held_by(application: ApplicationState) -> _Held | None:
    """What a running application holds of its accelerator's group."""
    args = args_of(application)
    if args is None:
        return None
    stages = max(args.engine.pipeline_parallel_size, 1)
    demand = Demand(args.resources.num_gpus / stages, args.resources.num_cpus, 0.0, stages)
    return _Held(args.accelerator, demand, application.total_replicas)


def demand_of(plan: VariantPlan) -> Demand:
    """What one pipeline stage of a planned replica takes of one node."""
    stages = max(plan.pipeline_parallel_size, 1)
    on_cpu = plan.accelerators_per_replica == 0
    host = plan.weights_gib + plan.overhead_gib + plan.kv_cache_gib if on_cpu else 0.0
    return Demand(plan.accelerators_per_replica / stages, plan.resources.num_cpus, host, stages)


def less(view: PoolView, held: Iterable[_Held]) -> PoolView:
    """A pool less what is held."""
    capacity = {group.accelerator: GroupCapacity.of(group) for group in view.groups}
    total: Counter[tuple[str, Demand]] = Counter()
    for one in held:
        total[one.accelerator, one.demand] += one.replicas
    # Large ones first: they need whole nodes.
    for (accelerator, demand), replicas in sorted(total.items(), key=lambda item: _size(item[0][1])):
        if accelerator in capacity:
            # More may be held than there is, when nodes went: then nothing of this kind is free.
            capacity[accelerator].place_many(demand, replicas)
    return PoolView(tuple(_left(group, capacity[group.accelerator]) for group in view.groups))


def _size(demand: Demand) -> tuple[float, float, float, int]:
    return (-demand.gpus, -demand.memory_gib, -demand.cpus, demand.nodes)


def _left(group: AcceleratorGroup, capacity: GroupCapacity) -> AcceleratorGroup:
    # Nodes that a plan already asks for count as running ones: what is left on them can be planned with.
    nodes = tuple(
        NodeCapacity(node.gpus, node.cpus, node.memory_gib, count) for node, count in capacity.nodes.items()
    )
    return replace(group, nodes=nodes, obtainable_nodes=capacity.obtainable)


def _plan(requests: Mapping[Key, VariantRequest], view: PoolView) -> dict[Key, PlanResult]:
    names = {f"{key}\n{variant}": (key, variant) for key, variant in requests}
    found = plan_all({name: requests[pair] for name, pair in names.items()}, view)
    return {names[name]: result for name, result in found.items()}


def _request(
    deployment: ModelDeployment, variant: Variant, facts: Facts, observed: Observed
) -> VariantRequest:
    args = _in_use(variant.name, observed)
    status = deployment.status
    if status is not None and status.observed_generation != deployment.metadata.generation:
        # What was measured may have been measured with other settings.
        deployment = deployment.model_copy(update={"status": None})
    return variant_request(
        deployment,
        variant,
        facts,
        replicas=replicas_of(deployment, variant, observed),
        current=args.accelerator if args else None,
        current_percent=args.engine.gpu_memory_percent if args and args.resources.num_gpus < 1 else None,
        lora_rank=_lora_rank_in_use(variant.name, observed),
    )


def _lora_rank_in_use(variant: str, observed: Observed) -> int | None:
    """The highest rank that an engine of the variant has slots for."""
    running = (seen.application for seen in observed.revisions(variant).values())
    started = (args_of(state) for state in running if state and not state.deleting)
    return max((a.engine.lora.max_rank for a in started if a and a.engine.lora), default=None)


def _in_use(variant: str, observed: Observed) -> ApplicationArgs | None:
    """How the revision with the most ready replicas runs: it stays so as long as the plan allows."""
    running = [
        (seen.ready, args.accelerator, number)
        for number, seen in observed.revisions(variant).items()
        if seen.application and not seen.application.deleting and (args := args_of(seen.application))
    ]
    if not running:
        return None
    application = observed.revisions(variant)[max(running)[2]].application
    return args_of(application) if application else None


def _revision_is_due(
    deployment: ModelDeployment, variant: Variant, result: PlanResult, observed: Observed
) -> bool:
    running = observed.revisions(variant.name)
    return (
        result.plan is not None
        and bool(running)
        and revision(deployment, variant, result.plan) not in running
    )
