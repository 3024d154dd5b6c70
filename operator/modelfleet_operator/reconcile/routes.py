"""The route of a ModelDeployment, as the registry joins it with the endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from modelfleet_operator.api import ModelDeployment, duration_seconds
from modelfleet_operator.reconcile.rollout import VariantRollout
from modelfleet_serving.contract import Affinity, QueueSettings, RouteSpec, Task, VariantRouteSpec


def route_of(deployment: ModelDeployment, rollouts: Mapping[str, VariantRollout]) -> RouteSpec:
    """The route: every variant of the spec, with the revisions that take requests."""
    routing = deployment.spec.routing
    return RouteSpec(
        name=deployment.model_name,
        namespace=deployment.metadata.namespace,
        deployment=deployment.metadata.name,
        variants=[
            VariantRouteSpec(name=v.name, revisions=dict(rollouts[v.name].revisions))
            for v in deployment.spec.variants
        ],
        weights={v.name: deployment.weight(v) for v in deployment.spec.variants},
        fallback=list(routing.fallback),
        affinity=Affinity(routing.affinity),
        queue=QueueSettings(
            max_requests=routing.queue.max_requests,
            timeout_seconds=duration_seconds(routing.queue.timeout),
        ),
        task=Task(deployment.spec.model.task),
        adapters=[a.name for a in deployment.spec.adapters],
    )
