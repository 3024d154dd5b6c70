"""Variants that a spec no longer has: they serve on until those in their place do.

A variant that is renamed, or replaced by another, is one that leaves and one that comes. Removed at once, it
would leave clients waiting for as long as the other takes to load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.planner.types import PlanResult, Rule
from modelfleet_operator.reconcile.applications import Application, args_of
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reconcile.observed import Observed, Revision
from modelfleet_operator.reconcile.rollout import VariantRollout, roll_out

_NO_ROOM: Final = frozenset({Rule.NONE_FREE, Rule.PENDING_TOO_LONG})


@dataclass(frozen=True)
class Leaving:
    """What serves on.

    Attributes:
        rollouts: by variant; each goes on as it runs.
        ready: those of them that answer requests.
    """

    rollouts: Mapping[str, VariantRollout] = field(default_factory=dict)
    ready: tuple[str, ...] = ()

    @property
    def applications(self) -> Iterator[Application]:
        """Their applications."""
        return (app for rollout in self.rollouts.values() for app in rollout.applications)


def leaving(
    deployment: ModelDeployment,
    plans: Mapping[str, PlanResult],
    wanted: Mapping[str, Application | None],
    observed: Observed,
) -> Leaving:
    """What serves on of variants that the spec no longer has.

    Args:
        deployment: what the user wants.
        plans: the planner's answers by variant.
        wanted: the application of each variant, in the end.
        observed: what runs.
    """
    gone = sorted(observed.variants.keys() - wanted.keys())
    seen = {name: observed.revisions(name) for name in gone}
    if not gone or not _needed(deployment, plans, wanted, observed, _accelerators(seen)):
        return Leaving()
    all_on = {name: roll_out(None, found, surge=True, blind=observed.blind) for name, found in seen.items()}
    rollouts = {name: rollout for name, rollout in all_on.items() if rollout.applications}
    ready = tuple(name for name in rollouts if any(r.ready for r in seen[name].values()))
    return Leaving(rollouts, ready)


def _needed(
    deployment: ModelDeployment,
    plans: Mapping[str, PlanResult],
    wanted: Mapping[str, Application | None],
    observed: Observed,
    held: Collection[str],
) -> bool:
    """Whether clients would miss them: nothing else serves, or something is about to."""
    strategy = deployment.spec.rollout.strategy
    if strategy == "Recreate":
        return False
    if observed.blind:
        return True
    if strategy == "Auto" and any(_lacks_room(result, held) for result in plans.values()):
        return False  # they make room
    serves = any(_serves(name, wanted[name], observed) for name in wanted)
    return not serves or any(_comes(name, wanted[name], plans[name], observed) for name in wanted)


def _serves(name: str, application: Application | None, observed: Observed) -> bool:
    on_demand = application is not None and not application.replicas
    return on_demand or any(r.ready for r in observed.revisions(name).values())


def _comes(name: str, application: Application | None, plan: PlanResult, observed: Observed) -> bool:
    """Whether a variant does not serve yet and is about to."""
    if _serves(name, application, observed):
        return False
    if application is None:
        return plan.reason == Rule.READING_MODEL
    mine = observed.revisions(name).get(application.args.revision)
    if mine is None:
        return True
    refused = mine.application is not None and mine.application.status == "DEPLOY_FAILED"
    return mine.failure is None and not refused


def _accelerators(seen: Mapping[str, Mapping[str, Revision]]) -> set[str]:
    """What they hold."""
    states = (found.application for revisions in seen.values() for found in revisions.values())
    return {args.accelerator for state in states if state and (args := args_of(state))}


def _lacks_room(result: PlanResult, held: Collection[str]) -> bool:
    """Whether a variant waits for what others hold."""
    if result.fits:
        return False
    return any(r.rule in _NO_ROOM and r.accelerator in held for r in result.rejections)


def said(findings: Sequence[Finding], stay: Leaving) -> tuple[Finding, ...]:
    """Conditions with what serves on: clients are answered, though by none of the spec's variants."""
    if not stay.ready:
        return tuple(findings)
    names = ", ".join(f"{name} (until another variant serves)" for name in stay.ready)
    return tuple(
        Finding("Serving", "True", "EndpointsReady", names)
        if f.type == "Serving" and f.status == "False"
        else f
        for f in findings
    )
