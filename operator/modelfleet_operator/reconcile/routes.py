"""The route of a ModelDeployment, as the registry joins it with the endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from modelfleet_operator.api import ModelDeployment, duration_seconds
from modelfleet_operator.reconcile.rollout import VariantRollout
from modelfleet_serving.contract import Affinity, QueueSettings, RouteSpec, Task, VariantRouteSpec


def route_of(
    deployment: ModelDeployment,
    rollouts: Mapping[str, VariantRollout],
    staying: Mapping[str, VariantRollout] | None = None,
) -> RouteSpec:
    """The route: every variant of the spec, with the revisions that take requests.

    Args:
        deployment: the resource.
        rollouts: by variant of the spec.
        staying: by variant that the spec no longer has: clients who ask for it, or for one that can't serve
            yet, still get it.
    """
    routing, staying = deployment.spec.routing, staying or {}
    return RouteSpec(
        name=deployment.model_name,
        namespace=deployment.metadata.namespace,
        deployment=deployment.metadata.name,
        variants=[
            VariantRouteSpec(name=v.name, revisions=dict(rollouts[v.name].revisions))
            for v in deployment.spec.variants
        ]
        + [VariantRouteSpec(name=name, revisions=dict(r.revisions)) for name, r in staying.items()],
        weights={v.name: deployment.weight(v) for v in deployment.spec.variants} | dict.fromkeys(staying, 0),
        fallback=[*routing.fallback, *staying],
        affinity=Affinity(routing.affinity),
        queue=QueueSettings(
            max_requests=routing.queue.max_requests,
            timeout_seconds=duration_seconds(routing.queue.timeout),
        ),
        task=Task(deployment.spec.model.task),
        adapters=[a.name for a in deployment.spec.adapters],
        suspended=deployment.spec.suspend,
    )
