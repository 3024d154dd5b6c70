"""What the user reads: a line per variant and the conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelfleet_operator.api import (
    Condition,
    MeasurementStatus,
    ModelDeployment,
    ModelDeploymentStatus,
    PlanStatus,
    RejectionStatus,
    VariantStatus,
)
from modelfleet_operator.planner.types import PlanResult, VariantPlan
from modelfleet_operator.reconcile.applications import Application
from modelfleet_operator.reconcile.conditions import Finding, Truth, with_times
from modelfleet_operator.reconcile.observed import Observed, Revision
from modelfleet_operator.reconcile.rollout import VariantRollout
from modelfleet_serving.contract import EndpointState, Heartbeat

_MAX_MESSAGE = 8000
_TRACEBACK_LINES = 4
_HEAD = 1000
"""Characters from the beginning of a text that is too long; the rest is its end, where tracebacks say why."""


def describe(
    deployment: ModelDeployment,
    plans: Mapping[str, PlanResult],
    wanted: Mapping[str, Application | None],
    rollouts: Mapping[str, VariantRollout],
    observed: Observed,
) -> tuple[tuple[VariantStatus, ...], tuple[Finding, ...]]:
    """Status rows and conditions, without times."""
    rows = []
    for variant in deployment.spec.variants:
        name = variant.name
        rows.append(
            _row(name, deployment.weight(variant), plans[name], wanted[name], rollouts[name], observed)
        )
    findings = (
        Finding("Accepted", "True", "Valid", "the spec is valid"),
        _fits(plans),
        _progressing(rows, rollouts),
        _serving(rows, observed),
        Finding("Suspended", "False", "NotSuspended"),
        _ready(rows, rollouts, observed),
    )
    return tuple(rows), findings


def _row(
    name: str,
    weight: int,
    result: PlanResult,
    wanted: Application | None,
    rollout: VariantRollout,
    observed: Observed,
) -> VariantStatus:
    revisions = observed.revisions(name)
    routed = [revisions[r] for r in rollout.revisions if r in revisions]
    ready = sum(r.ready for r in routed)
    mine = revisions.get(wanted.args.revision) if wanted else None
    reason, message = _state(result, wanted, mine, ready, observed)
    plan = result.plan
    return VariantStatus(
        name=name,
        revision=wanted.args.revision if wanted else None,
        accelerator=plan.accelerator if plan else None,
        tensor_parallel=plan.tensor_parallel_size if plan else None,
        pipeline_parallel=plan.pipeline_parallel_size if plan and plan.pipeline_parallel_size > 1 else None,
        replicas=wanted.replicas if wanted else 0,
        ready_replicas=ready,
        weight=weight,
        reason=reason,
        message=_shortened(message),
        plan=_plan_status(plan) if plan else None,
        rejections=[
            RejectionStatus(accelerator=r.accelerator, reason=str(r.rule), message=r.message[:_MAX_MESSAGE])
            for r in result.rejections[:32]
        ]
        or None,
        measurements=measurements({wanted.args.revision: mine}, plan) or None if wanted and mine else None,
    )


def _plan_status(plan: VariantPlan) -> PlanStatus:
    return PlanStatus(
        weights_gi_b=f"{plan.weights_gib:.2f}",
        kv_cache_gi_b=f"{max(plan.kv_cache_gib, 0):.2f}",
        kv_cache_tokens=plan.kv_cache_tokens,
        max_model_len=plan.max_model_len,
        measured=plan.measured is not None or None,
        notes=[note[:_MAX_MESSAGE] for note in plan.notes] or None,
    )


def measurements(revisions: Mapping[str, Revision], plan: VariantPlan | None) -> list[MeasurementStatus]:
    """What the engines reported at boot, one for each accelerator."""
    found: dict[str, MeasurementStatus] = {}
    for revision, seen in revisions.items():
        for endpoint in seen.endpoints:
            memory = endpoint.memory
            if memory is None or memory.kv_cache_tokens is None:
                continue
            found[endpoint.accelerator] = MeasurementStatus(
                accelerator=endpoint.accelerator,
                revision=revision,
                tensor_parallel=plan.tensor_parallel_size if plan else 1,
                weights_gi_b=_gib(memory.weights_gib),
                kv_cache_gi_b=_gib(memory.kv_cache_gib),
                kv_cache_tokens=memory.kv_cache_tokens,
            )
    return list(found.values())


def _gib(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _state(
    result: PlanResult, wanted: Application | None, mine: Revision | None, ready: int, observed: Observed
) -> tuple[str, str]:
    """Reason and message of a variant."""
    if wanted is None:
        return result.reason, result.message
    if wanted.replicas == 0:
        return "ScaledToZero", "starts with the next request"
    if mine is not None and mine.ready >= wanted.replicas - result.short and not observed.blind:
        # A registry that has just started gives routers no table yet: ready is not routable.
        return (result.reason, result.message) if result.short else _adapters(wanted, mine)
    failure = mine.failure if mine else None
    if failure is not None:
        return failure.reason or "EngineFailed", _failure(failure)
    application = mine.application if mine else None
    if application is not None and application.status == "DEPLOY_FAILED":
        return "DeployFailed", application.message
    if observed.blind:
        return "Unknown", "the registry can't be reached or has just started"
    states = [e.state for e in mine.endpoints] if mine else []
    if EndpointState.STARTING in states:
        return ("Updating" if ready else "Starting"), ""
    if application is None:
        return "Deploying", ""
    return "Pending", application.message or "Ray has not placed the replica yet"


def _adapters(wanted: Application, mine: Revision) -> tuple[str, str]:
    """Reason and message of a variant whose replicas are ready: they may lack adapters yet."""
    names = {adapter.name for adapter in wanted.running_config.adapters}
    ready = [e for e in mine.endpoints if e.state is EndpointState.READY]
    problems = {name: problem for e in ready for name, problem in e.adapter_problems.items() if name in names}
    if problems:
        message = "; ".join(f"adapter {name}: {problem}" for name, problem in sorted(problems.items()))
        return "AdapterNotLoaded", message
    if missing := {name for e in ready for name in names - set(e.adapters)}:
        return "LoadingAdapters", ", ".join(sorted(missing))
    return "Serving", ""


def _failure(endpoint: Heartbeat) -> str:
    again = f" (started {endpoint.restarts + 1} times)" if endpoint.restarts else ""
    return f"replica {endpoint.id}{again}: {endpoint.message}"


def _fits(plans: Mapping[str, PlanResult]) -> Finding:
    refused = {name: p for name, p in plans.items() if not p.fits}
    if not refused:
        return Finding("Fits", "True", "AllVariantsFit", _places(plans))
    status: Truth = "Unknown" if all(p.retryable for p in refused.values()) else "False"
    reasons = {p.reason for p in refused.values()}
    message = "; ".join(f"{name}: {p.message}" for name, p in refused.items())
    return Finding(
        "Fits", status, reasons.pop() if len(reasons) == 1 else "VariantsDoNotFit", message[:_MAX_MESSAGE]
    )


def _places(plans: Mapping[str, PlanResult]) -> str:
    return ", ".join(f"{name} on {p.plan.accelerator}" for name, p in plans.items() if p.plan)


def _progressing(rows: Sequence[VariantStatus], rollouts: Mapping[str, VariantRollout]) -> Finding:
    moving = [row for row in rows if rollouts[row.name].progressing]
    if not moving:
        return Finding("Progressing", "False", "Complete")
    return Finding("Progressing", "True", "RollingOut", ", ".join(f"{r.name}: {r.reason}" for r in moving))


def _serving(rows: Sequence[VariantStatus], observed: Observed) -> Finding:
    serving = [row.name for row in rows if row.ready_replicas]
    if observed.blind:
        return Finding("Serving", "Unknown", "RegistryUnavailable", ", ".join(serving))
    if serving:
        return Finding("Serving", "True", "EndpointsReady", ", ".join(serving))
    if rows and all(row.reason == "ScaledToZero" for row in rows):
        return Finding("Serving", "True", "ScaledToZero", "the next request starts a replica")
    return Finding("Serving", "False", "NoReadyEndpoint", "; ".join(f"{r.name}: {r.reason}" for r in rows))


def _ready(
    rows: Sequence[VariantStatus], rollouts: Mapping[str, VariantRollout], observed: Observed
) -> Finding:
    waiting = [
        row for row in rows if row.reason not in ("Serving", "ScaledToZero") or rollouts[row.name].progressing
    ]
    if not waiting:
        ready = ", ".join(f"{r.name}: {r.ready_replicas}/{r.replicas} replicas" for r in rows)
        return Finding("Ready", "True", "AllVariantsReady", ready)
    refused = [row for row in waiting if row.revision is None]
    if observed.blind and not refused:
        unseen = "the registry can't be reached or has just started: what runs goes on"
        return Finding("Ready", "Unknown", "RegistryUnavailable", unseen)
    # What can't run at all is said first: it will not pass by waiting.
    waiting = [*refused, *(row for row in waiting if row not in refused)]
    first = waiting[0]
    reason = first.reason if first.reason not in ("Serving", "ScaledToZero") else "RollingOut"
    message = "; ".join(f"{r.name}: {_gist(r.message) or r.reason}" for r in waiting)
    return Finding("Ready", "False", reason, message[:_MAX_MESSAGE])


def _shortened(text: str) -> str:
    if len(text) <= _MAX_MESSAGE:
        return text
    return f"{text[:_HEAD]}\n...\n{text[_HEAD - _MAX_MESSAGE + 5 :]}"


def _gist(text: str) -> str:
    """What a message begins and ends with; the whole stands in the variant's row."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < _TRACEBACK_LINES:
        return " ".join(lines)
    return f"{lines[0]} ... {lines[-1]} (all of it in status.variants)"


def deployment_status(
    deployment: ModelDeployment,
    variants: Sequence[VariantStatus],
    findings: Sequence[Finding],
    before: Sequence[Condition],
    now: str,
    old: ModelDeploymentStatus | None = None,
) -> ModelDeploymentStatus:
    """The whole status.

    Args:
        deployment: the resource.
        variants: its rows.
        findings: its conditions without times.
        before: the conditions that stand in status.
        now: RFC 3339.
        old: status about the same generation: what engines measured on other accelerators is kept.
    """
    variants = [_with_old_measurements(row, old) for row in variants]
    ready = sum(row.reason in ("Serving", "ScaledToZero") for row in variants)
    return ModelDeploymentStatus(
        conditions=with_times(findings, before, deployment.metadata.generation, now),
        observed_generation=deployment.metadata.generation,
        model=deployment.model_name,
        ready=f"{ready}/{len(deployment.spec.variants)}",
        variant_names=",".join(v.name for v in deployment.spec.variants),
        replicas=sum(row.replicas for row in variants),
        ready_replicas=sum(row.ready_replicas for row in variants),
        variants=list(variants),
    )


def _with_old_measurements(row: VariantStatus, old: ModelDeploymentStatus | None) -> VariantStatus:
    before = next((v for v in old.variants if v.name == row.name), None) if old else None
    if before is None or not before.measurements:
        return row
    merged = {m.accelerator: m for m in [*before.measurements, *(row.measurements or ())]}
    return row.model_copy(update={"measurements": list(merged.values())})


def first_status() -> tuple[Finding, ...]:
    """Conditions at first sight: every type stands there from the beginning."""
    rest = ("Fits", "Progressing", "Serving", "Suspended", "Ready")
    return (
        Finding("Accepted", "True", "Valid", "the spec is valid"),
        *(Finding(kind, "Unknown", "Pending", "not looked at yet") for kind in rest),
    )


def refused_status(deployment: ModelDeployment | str, reason: str, message: str) -> tuple[Finding, ...]:
    """Conditions of a ModelDeployment that can't be accepted.

    Args:
        deployment: the resource, or the key of one that can't be understood.
        reason: CamelCase, stable.
        message: for people.
    """
    key = deployment if isinstance(deployment, str) else deployment.key
    unknown = [
        Finding(kind, "Unknown", "NotAccepted") for kind in ("Fits", "Progressing", "Serving", "Suspended")
    ]
    return (
        Finding("Accepted", "False", reason, message),
        *unknown,
        Finding("Ready", "False", reason, f"{key}: {message}"),
    )


def without_ray(findings: Sequence[Finding], reason: str, message: str) -> tuple[Finding, ...]:
    """Conditions while Ray can't be reached: what serves goes on serving, nothing else can be brought about.

    Args:
        findings: the last ones; none when nothing was seen yet.
        reason: ``RayUnreachable`` or ``RayRefused``.
        message: what went wrong.
    """
    if not findings:
        return (
            Finding("Accepted", "True", "Valid", "the spec is valid"),
            *(Finding(f.type, "Unknown", reason, message) for f in first_status()[1:]),
        )
    return tuple(
        Finding(f.type, "Unknown", reason, message) if f.type == "Ready" and f.status != "True" else f
        for f in findings
    )
