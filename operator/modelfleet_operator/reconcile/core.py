"""The reconcile step of one ModelDeployment: start reading here.

``reconcile`` turns what the user wants, what the planner says and what runs into what shall run, what the
routers shall know, and what the user shall read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelfleet_operator.api import ModelDeployment, Variant, VariantStatus
from modelfleet_operator.planner.types import PlanResult
from modelfleet_operator.reconcile.applications import Application, application_args, running_config
from modelfleet_operator.reconcile.autoscale import wanted_replicas
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reconcile.leaving import leaving, said
from modelfleet_operator.reconcile.observed import Observed
from modelfleet_operator.reconcile.rollout import VariantRollout, roll_out
from modelfleet_operator.reconcile.routes import route_of
from modelfleet_operator.reconcile.status import describe
from modelfleet_operator.reconcile.suspension import suspended_findings, suspended_rows
from modelfleet_serving.contract import ModelDemand, RouteSpec


@dataclass(frozen=True)
class Decision:
    """What follows for one ModelDeployment."""

    applications: tuple[Application, ...]
    route: RouteSpec
    variants: tuple[VariantStatus, ...]
    findings: tuple[Finding, ...]

    @property
    def settled(self) -> bool:
        """Whether nothing is under way that Ray would have to be asked about."""
        at_rest = {"Ready": "True", "Progressing": "False"}
        return all(f.status == at_rest.get(f.type, f.status) for f in self.findings)


def reconcile(
    deployment: ModelDeployment,
    plans: Mapping[str, PlanResult],
    observed: Observed,
    registry: str,
    room: Mapping[str, bool],
) -> Decision:
    """One step.

    Args:
        deployment: what the user wants.
        plans: the planner's answer by variant.
        observed: what runs.
        registry: address of the pool's registry, as replicas reach it.
        room: by variant, whether a second revision fits beside the running one.
    """
    if deployment.spec.suspend:
        return _suspended(deployment, plans, observed, registry)
    rollouts: dict[str, VariantRollout] = {}
    wanted: dict[str, Application | None] = {}
    for variant in deployment.spec.variants:
        plan = plans[variant.name]
        application = _wanted(deployment, variant, plan, observed, registry)
        wanted[variant.name] = application
        rollouts[variant.name] = roll_out(
            application,
            observed.revisions(variant.name),
            surge=_surge(deployment, room.get(variant.name, True)),
            blind=observed.blind,
        )
    promised = {v.name: _promised(deployment, v, plans[v.name], observed) for v in deployment.spec.variants}
    variants, findings = describe(deployment, promised, wanted, rollouts, observed)
    stay = leaving(deployment, plans, wanted, observed)
    return Decision(
        applications=(*(app for r in rollouts.values() for app in r.applications), *stay.applications),
        route=route_of(deployment, rollouts, stay.rollouts),
        variants=variants,
        findings=said(findings, stay),
    )


def _suspended(
    deployment: ModelDeployment, plans: Mapping[str, PlanResult], observed: Observed, registry: str
) -> Decision:
    """Nothing runs: what did is removed, which drains it."""
    wanted = {
        v.name: _wanted(deployment, v, plans[v.name], observed, registry) for v in deployment.spec.variants
    }
    nothing = {v.name: VariantRollout() for v in deployment.spec.variants}
    rows, findings = describe(deployment, plans, wanted, nothing, observed)
    return Decision(
        applications=(),
        route=route_of(deployment, nothing),
        variants=suspended_rows(rows),
        findings=suspended_findings(findings, observed),
    )


def _wanted(
    deployment: ModelDeployment, variant: Variant, result: PlanResult, observed: Observed, registry: str
) -> Application | None:
    if result.plan is None:
        return None
    args = application_args(deployment, variant, result.plan, registry)
    replicas = replicas_of(deployment, variant, observed)
    if result.short:
        replicas = max(replicas - result.short, variant.replicas.min)
    return Application(args, replicas, running_config(deployment))


def _promised(
    deployment: ModelDeployment, variant: Variant, result: PlanResult, observed: Observed
) -> PlanResult:
    """A plan as its user reads it: replicas that demand alone asks for were promised to nobody."""
    if result.short and replicas_of(deployment, variant, observed) - result.short >= variant.replicas.min:
        return replace(result, short=0, reason="Planned")
    return result


def replicas_of(deployment: ModelDeployment, variant: Variant, observed: Observed) -> int:
    """Replicas that a variant shall have now."""
    if deployment.spec.suspend:
        return 0
    revisions = observed.revisions(variant.name).values()
    return wanted_replicas(
        variant.replicas,
        demand_of(variant.name, observed),
        smallest_capacity(variant.name, observed),
        current=max((r.application.total_replicas for r in revisions if r.application), default=0),
        calm_seconds=observed.calm_seconds.get(variant.name, 0.0),
    )


def demand_of(variant: str, observed: Observed) -> ModelDemand | None:
    """What routers report for a variant; requests that wait without a variant count for every one."""
    return observed.demand.get(variant) or observed.demand.get("")


def smallest_capacity(variant: str, observed: Observed) -> int | None:
    """Requests that one replica of a variant runs at once, where its engine says so."""
    revisions = observed.revisions(variant).values()
    return min((e.capacity for r in revisions for e in r.endpoints if e.capacity), default=None)


def _surge(deployment: ModelDeployment, room: bool) -> bool:
    strategy = deployment.spec.rollout.strategy
    return strategy == "Surge" or (strategy == "Auto" and room)
