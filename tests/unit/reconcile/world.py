"""A small world to reconcile in: Ray that starts and drains a step at a time, and replicas that report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modelfleet_operator.api import ModelDeployment, parse_object
from modelfleet_operator.planner.types import PlanResult, VariantPlan
from modelfleet_operator.reconcile.applications import ApplicationState
from modelfleet_operator.reconcile.core import Decision, reconcile
from modelfleet_operator.reconcile.observed import Observed, PoolSight
from modelfleet_serving.contract import (
    EndpointState,
    EngineSettings,
    Heartbeat,
    ModelDemand,
    RegistryState,
    ReplicaResources,
)

REGISTRY = "http://127.0.0.1:1"


def deployment(**fields: Any) -> ModelDeployment:
    """A ModelDeployment with variants a and b, unless told otherwise."""
    base: dict[str, Any] = {"model": {"source": "hf://o/n"}, "variants": [{"name": "a"}, {"name": "b"}]}
    resource = parse_object(
        {
            "apiVersion": "modelfleet.io/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": "m", "generation": 1},
            "spec": base | fields,
        }
    )
    assert isinstance(resource, ModelDeployment)
    return resource


def plan(accelerator: str = "A10", **fields: Any) -> PlanResult:
    """A plan that fits."""
    base: dict[str, Any] = {
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "accelerators_per_replica": 1.0,
        "max_model_len": 4096, "dtype": "bfloat16", "kv_cache_dtype": "auto", "weight_scheme": "W16A16",
        "weights_gib": 14.0, "overhead_gib": 1.0, "kv_cache_gib": 5.0, "kv_cache_tokens": 40_000,
        "max_sequences": 10.0, "largest_context": 40_000, "cost": 1.0,
        "engine": EngineSettings(type="vLLM"), "resources": ReplicaResources(num_gpus=1),
    }  # fmt: skip
    return PlanResult(plan=VariantPlan(accelerator=accelerator, **(base | fields)))


@dataclass
class App:
    config: dict[str, Any]
    replicas: list[EndpointState]
    adapters: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    deleting: bool = False

    @property
    def wanted(self) -> int:
        replicas: int = self.config["deployments"][0]["num_replicas"]
        return replicas


@dataclass
class World:
    """What Ray and the registry would report."""

    apps: dict[str, App] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Revisions whose engines fail."""
    registry_up: bool = True
    started: list[str] = field(default_factory=list)
    """Names of applications in the order of their start."""
    demand: list[ModelDemand] = field(default_factory=list)

    def observed(self, calm: dict[str, float] | None = None) -> Observed:
        states = {
            name: ApplicationState(
                name,
                "DELETING" if app.deleting else "RUNNING",
                config=app.config,
                total_replicas=len(app.replicas),
            )
            for name, app in self.apps.items()
        }
        heartbeats = [
            Heartbeat(
                id=f"{name}#{i}",
                application=name,
                model="m",
                url="http://127.0.0.1:2",
                state=state,
                sequence=1,
                adapters=app.adapters,
                adapter_problems=app.problems,
            )
            for name, app in self.apps.items()
            for i, state in enumerate(app.replicas)
        ]
        registry = RegistryState(epoch="e", version=1, endpoints=heartbeats, demand=self.demand)
        sight = PoolSight()
        sight.see_applications(states)
        sight.see_registry(registry if self.registry_up else None)
        return sight.of("default/m", "m", calm)

    def apply(self, decision: Decision) -> None:
        """Serve's declarative PUT."""
        configs = {app.name: app.config() for app in decision.applications}
        for name, app in self.apps.items():
            if name not in configs:
                app.deleting = True
                app.replicas = [EndpointState.DRAINING for _ in app.replicas]
        for name, config in configs.items():
            if name in self.apps and not self.apps[name].deleting:
                self.apps[name].config = config
            elif name not in self.apps:
                self.apps[name] = App(config, [])
                self.started.append(name)

    def advance(self) -> None:
        """One step of everything that takes time."""
        self.apps = {name: app for name, app in self.apps.items() if not app.deleting}
        for name, app in self.apps.items():
            app.replicas = app.replicas[: app.wanted]
            good = EndpointState.FAILED if name.rsplit(".", 1)[1] in self.broken else EndpointState.READY
            app.replicas = [good for _ in app.replicas]
            app.replicas += [EndpointState.STARTING] * (app.wanted - len(app.replicas))

    def ready(self, variant: str) -> int:
        return sum(
            state == EndpointState.READY
            for name, app in self.apps.items()
            if name.split(".")[2] == variant and not app.deleting
            for state in app.replicas
        )


def step(
    world: World, resource: ModelDeployment, plans: dict[str, PlanResult], room: dict[str, bool] | None = None
) -> Decision:
    """One reconcile step against the world."""
    decision = reconcile(resource, plans, world.observed(), REGISTRY, room or {})
    world.apply(decision)
    return decision


def settle(
    world: World, resource: ModelDeployment, plans: dict[str, PlanResult], room: dict[str, bool] | None = None
) -> Decision:
    """Steps until nothing changes any more."""
    for _ in range(12):
        step(world, resource, plans, room)
        world.advance()
    return step(world, resource, plans, room)


def condition(decision: Decision, kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    (found,) = [f for f in decision.findings if f.type == kind]
    return found.status, found.reason
