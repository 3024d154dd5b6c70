"""Tells whoever shows the status what is known of ModelDeployments, where that changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from modelfleet_operator.api import ModelDeployment
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reconcile.core import Decision
from modelfleet_operator.reconcile.status import refused_status, without_ray


@dataclass(frozen=True)
class Report:
    """What is known of one ModelDeployment after a step; ``decision`` is ``None`` where there is none yet."""

    deployment: ModelDeployment
    decision: Decision | None
    findings: tuple[Finding, ...]


@dataclass
class Reporter:
    """Reports of one pool.

    Attributes:
        send: called with the reports that differ from the last ones.
    """

    send: Callable[[list[Report]], Awaitable[None]]
    _told: dict[str, tuple[ModelDeployment, object]] = field(default_factory=dict)

    def forget(self, key: str) -> None:
        """A ModelDeployment is gone."""
        self._told.pop(key, None)

    async def tell(self, reports: Iterable[Report]) -> None:
        """Send what was not told yet."""
        news = []
        for report in reports:
            key, told = report.deployment.key, (report.deployment, _content(report))
            if self._told.get(key) != told:
                self._told[key] = told
                news.append(report)
        if news:
            await self.send(news)


def decided(
    deployments: Iterable[ModelDeployment], decisions: Mapping[str, Decision], refused: Mapping[str, str]
) -> list[Report]:
    """Reports of the ModelDeployments for which something was decided.

    Args:
        deployments: those to report of.
        decisions: by ``namespace/name``.
        refused: by ``namespace/name``, why the registry did not take a route.
    """
    return [
        Report(
            deployment,
            decision,
            refused_status(deployment, "NameTaken", refused[deployment.key])
            if deployment.key in refused
            else decision.findings,
        )
        for deployment in deployments
        if (decision := decisions.get(deployment.key)) is not None
    ]


def unreachable(
    deployments: Iterable[ModelDeployment], decisions: Mapping[str, Decision], reason: str, message: str
) -> list[Report]:
    """Reports while Ray can't be reached: what was last decided, and that it may not be so any longer."""
    return [
        Report(
            deployment,
            decision,
            without_ray(decision.findings if decision else (), reason, message),
        )
        for deployment in deployments
        for decision in (decisions.get(deployment.key),)
    ]


def _content(report: Report) -> object:
    return (report.findings, report.decision.variants if report.decision else ())
