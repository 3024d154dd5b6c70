"""Questions to the planner from what is wanted and what runs, for all ModelDeployments of a pool at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelfleet_operator.api import ModelDeployment, Variant
from modelfleet_operator.planner import (
    ModelFacts,
    ModelUnavailable,
    PlanResult,
    PoolView,
    VariantRequest,
    plan_all,
)
from modelfleet_operator.planner.inputs import variant_request
from modelfleet_operator.planner.types import AcceleratorPreference
from modelfleet_operator.reconcile.applications import args_of, revision
from modelfleet_operator.reconcile.core import replicas_of
from modelfleet_operator.reconcile.observed import Observed

Facts = Mapping[str, ModelFacts | ModelUnavailable]
Key = tuple[str, str]
"""ModelDeployment and variant."""


@dataclass(frozen=True)
class PoolPlan:
    """Plans of a pool.

    Attributes:
        results: by ModelDeployment and variant.
        room: whether a second revision fits beside the running one, where one is due.
    """

    results: Mapping[str, Mapping[str, PlanResult]]
    room: Mapping[str, Mapping[str, bool]]


def plan_pool(
    deployments: Mapping[str, ModelDeployment], facts: Facts, observed: Mapping[str, Observed], view: PoolView
) -> PoolPlan:
    """Plan every variant of a pool together.

    Args:
        deployments: by key.
        facts: by source; sources of variants that need none may be missing.
        observed: what runs, by key.
        view: what the pool has, with what our own replicas hold.
    """
    requests: dict[Key, VariantRequest] = {}
    for key, deployment in deployments.items():
        seen = observed.get(key, Observed())
        for variant in deployment.spec.variants:
            requests[key, variant.name] = _request(deployment, variant, facts, seen)
    answers = _plan(requests, view)
    room: dict[str, dict[str, bool]] = {key: {} for key in deployments}
    for key, deployment in deployments.items():
        seen = observed.get(key, Observed())
        for variant in deployment.spec.variants:
            result = answers[key, variant.name]
            if _revision_is_due(deployment, variant, result, seen):
                room[key][variant.name] = _fits_twice((key, variant.name), result, requests, view)
    results: dict[str, dict[str, PlanResult]] = {key: {} for key in deployments}
    for (key, name), result in answers.items():
        results[key][name] = result
    return PoolPlan(results, room)


def _plan(requests: Mapping[Key, VariantRequest], view: PoolView) -> dict[Key, PlanResult]:
    names = {f"{key}\n{variant}": (key, variant) for key, variant in requests}
    found = plan_all({name: requests[pair] for name, pair in names.items()}, view)
    return {names[name]: result for name, result in found.items()}


def _request(
    deployment: ModelDeployment, variant: Variant, facts: Facts, observed: Observed
) -> VariantRequest:
    return variant_request(
        deployment,
        variant,
        facts.get(deployment.source(variant)) if deployment.needs_facts(variant) else None,
        replicas=replicas_of(variant, observed),
        current=_accelerator_in_use(variant.name, observed),
    )


def _accelerator_in_use(variant: str, observed: Observed) -> str | None:
    """Where the revision with the most ready replicas runs: it stays there as long as the plan allows."""
    running = [
        (seen.ready, args.accelerator)
        for seen in observed.revisions(variant).values()
        if seen.application and not seen.application.deleting and (args := args_of(seen.application))
    ]
    return max(running)[1] if running else None


def _revision_is_due(
    deployment: ModelDeployment, variant: Variant, result: PlanResult, observed: Observed
) -> bool:
    running = observed.revisions(variant.name)
    return (
        result.plan is not None
        and bool(running)
        and revision(deployment, variant, result.plan) not in running
    )


def _fits_twice(key: Key, result: PlanResult, requests: Mapping[Key, VariantRequest], view: PoolView) -> bool:
    if result.plan is None:
        return False
    second = replace(
        requests[key], accelerators=(AcceleratorPreference(result.plan.accelerator),), current=None
    )
    return _plan({**requests, (key[0], f"{key[1]}\nsurge"): second}, view)[key[0], f"{key[1]}\nsurge"].fits
