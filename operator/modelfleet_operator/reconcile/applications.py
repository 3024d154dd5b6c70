"""Ray Serve applications: what each (model, variant, revision) is started with, and its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from modelfleet_operator.api import ModelDeployment, Variant, duration_seconds
from modelfleet_operator.planner.inputs import ray_resource
from modelfleet_operator.planner.types import VariantPlan
from modelfleet_serving.contract import (
    REGISTRY_APPLICATION,
    REGISTRY_IMPORT_PATH,
    REPLICA_DEPLOYMENT,
    REPLICA_IMPORT_PATH,
    Adapter,
    ApplicationArgs,
    ReplicaConfig,
    ReplicaResources,
    Task,
)

REVISION_LENGTH: Final = 6
MARK: Final = 0.001
"""What a replica takes of a resource that only marks nodes."""
_DRAIN_MARGIN_SECONDS: Final = 60.0
"""Serve's own deadline lies behind the replica's, so that the replica ends its engine itself."""


@dataclass(frozen=True)
class ApplicationState:
    """An application as Ray Serve reports it."""

    name: str
    status: str
    message: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    running_replicas: int = 0
    total_replicas: int = 0

    @property
    def deleting(self) -> bool:
        """Whether Serve is removing it."""
        return self.status == "DELETING"


@dataclass(frozen=True)
class Application:
    """An application as it shall be."""

    args: ApplicationArgs
    replicas: int
    running_config: ReplicaConfig = field(default_factory=ReplicaConfig)
    """What changes without a restart."""

    @property
    def name(self) -> str:
        """Name of the application."""
        return self.args.application

    def config(self) -> dict[str, Any]:
        """The application in Serve's configuration schema."""
        return {
            "name": self.name,
            "route_prefix": None,  # tokens never pass through Serve's proxy
            "import_path": REPLICA_IMPORT_PATH,
            "args": msgspec.to_builtins(self.args),
            "deployments": [
                {
                    "name": REPLICA_DEPLOYMENT,
                    "num_replicas": self.replicas,
                    "user_config": msgspec.to_builtins(self.running_config),
                    "graceful_shutdown_timeout_s": self.args.drain_timeout_seconds + _DRAIN_MARGIN_SECONDS,
                }
            ],
        }


def application_args(
    deployment: ModelDeployment, variant: Variant, plan: VariantPlan, registry: str
) -> ApplicationArgs:
    """Arguments of the application that runs a variant as planned, with its revision."""
    return ApplicationArgs(
        namespace=deployment.metadata.namespace,
        deployment=deployment.metadata.name,
        model=deployment.model_name,
        variant=variant.name,
        revision=revision(deployment, variant, plan),
        source=deployment.source(variant),
        registry=registry,
        engine=plan.engine,
        task=Task(deployment.spec.model.task),
        accelerator=plan.accelerator,
        resources=_on_engine_nodes(plan),
        drain_timeout_seconds=duration_seconds(deployment.spec.rollout.drain_timeout),
    )


def running_config(deployment: ModelDeployment) -> ReplicaConfig:
    """What replicas take over while they run."""
    adapters = [Adapter(name=a.name, source=a.source) for a in deployment.spec.adapters]
    return ReplicaConfig(adapters=adapters)


def engine_resource(engine: str) -> str:
    """Custom Ray resource that marks nodes whose image holds an engine."""
    return f"engine:{engine.lower()}"


def _on_engine_nodes(plan: VariantPlan) -> ReplicaResources:
    """What Ray reserves; in clusters that the operator makes, on nodes with the engine's image."""
    resources = plan.resources
    # The simulator is in every image.
    if ray_resource(plan.accelerator) not in resources.resources or plan.engine.type == "Simulator":
        return resources
    marks = {**resources.resources, engine_resource(plan.engine.type): MARK}
    return msgspec.structs.replace(resources, resources=marks)


def revision(deployment: ModelDeployment, variant: Variant, plan: VariantPlan) -> str:
    """Short hash of everything that changes a running engine.

    It holds what the user wrote and where the plan put it, not the numbers that the plan worked out: a
    measurement or a newer release that reckons otherwise must not restart an engine that runs. Of the
    adapters it holds whether there are any, and a rank above the default: an engine with LoRA loads others
    while it runs, up to the rank that it was started for.
    """
    engine = deployment.engine(variant).settings(adapters=bool(deployment.spec.adapters))
    content: dict[str, object] = {
        "model": deployment.model_name,
        "task": deployment.spec.model.task,
        "source": deployment.source(variant),
        "quantization": variant.quantization,
        "engine": msgspec.to_builtins(engine),
        "accelerator": plan.accelerator,
        "parallel": [plan.tensor_parallel_size, plan.pipeline_parallel_size],
        "dtype": plan.dtype,
    }
    lora = plan.engine.lora
    if engine.lora is not None and lora is not None and lora.max_rank != engine.lora.max_rank:
        content["loraRank"] = lora.max_rank
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:REVISION_LENGTH]


def args_of(state: ApplicationState) -> ApplicationArgs | None:
    """The arguments that a running application was started with; ``None`` when they are not ours."""
    try:
        return msgspec.convert(state.config.get("args"), ApplicationArgs)
    except msgspec.ValidationError:
        return None


def running_config_of(state: ApplicationState) -> ReplicaConfig:
    """What a running application's replicas were told last; nothing where that is not ours."""
    try:
        (deployment,) = state.config.get("deployments") or [{}]
        return msgspec.convert(deployment.get("user_config") or {}, ReplicaConfig)
    except (msgspec.ValidationError, ValueError):
        return ReplicaConfig()


def registry_application(args: Mapping[str, Any]) -> dict[str, Any]:
    """The registry's own application: one replica on the head node, with a port of its own."""
    return {
        "name": REGISTRY_APPLICATION,
        "route_prefix": None,
        "import_path": REGISTRY_IMPORT_PATH,
        "args": dict(args),
    }
