"""The administrator's resource: one Ray cluster and its accelerators."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints

from modelfleet_operator.api.base import (
    HELD_BY_SCHEMA,
    ApiModel,
    Duration,
    Memory,
    Quantity,
    Rule,
    memory_rule,
)
from modelfleet_operator.api.metadata import ObjectName
from modelfleet_operator.api.model_deployment import AcceleratorType
from modelfleet_operator.api.resource import Resource
from modelfleet_operator.api.status import ServingPoolStatus

HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+(/[^\s]*)?$", max_length=512)]
Image = Annotated[str, StringConstraints(pattern=r"^[^\s]+$", max_length=512)]
Label = Annotated[str, StringConstraints(max_length=253)]


def _is_url(value: str | None) -> bool:
    """Whether an address can be called: a host, and a port that there is."""
    if value is None:
        return True
    try:
        parts = urlsplit(value)
        return bool(parts.hostname) and (parts.port is None or 0 < parts.port < 65536) and "@" not in value
    except ValueError:  # brackets that hold no IPv6 address, a port that is no number
        return False


def _url_rule(field: str) -> Rule:
    """The rule that a field of `ray` is an address that can be called."""
    return Rule(
        cel=(
            f"!has(self.{field}) || (isURL(self.{field}) && url(self.{field}).getHostname() != ''"
            f" && !self.{field}.contains('@'))"
        ),
        message=f"ray.{field} must be a URL with a host, without a user: http://ray-head:8265",
        check=lambda self: _is_url(getattr(self, field)),
        field=field,
    )


class SecretKey(ApiModel):
    """A key of a Secret in the pool's namespace."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """Name of the Secret."""
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """Key in the Secret."""


class Toleration(ApiModel):
    """A taint that the nodes' pods tolerate, as in a pod."""

    key: Label | None = None
    """Key of the taint; empty with operator Exists tolerates all."""
    operator: Literal["Exists", "Equal"] | None = None
    """Whether the value must be equal. Default: Equal."""
    value: Label | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect that is tolerated. Default: all."""
    toleration_seconds: int | None = None
    """How long NoExecute is tolerated."""


class AcceleratorGroup(ApiModel):
    """Nodes of one kind."""

    type: AcceleratorType
    """Type, from the catalogue: T4, A10, A100-40G, A100-80G, H100, CPU."""
    node_selector: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Labels of the nodes. Default: the catalogue's product label."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints of the nodes. nvidia.com/gpu:NoSchedule is always tolerated."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """Accelerators of one node; 0 for CPU nodes."""
    cpus_per_node: Quantity | None = None
    """CPU cores that a pod on such a node asks for, as a quantity: 8 or 7500m."""
    memory_per_node: Memory | None = None
    """Memory that a pod on such a node asks for, as a quantity: 28Gi."""
    min_nodes: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Nodes that are always kept."""
    max_nodes: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Nodes at the most."""
    spot: bool = False
    """Whether the nodes can be taken away at short notice."""

    rules = (
        Rule(
            cel="self.minNodes <= self.maxNodes",
            message="minNodes must not exceed maxNodes",
            check=lambda self: self.min_nodes <= self.max_nodes,
            field="minNodes",
        ),
        memory_rule("memoryPerNode", "memory_per_node"),
    )


class HeadSpec(ApiModel):
    """The Ray head pod."""

    cpu: Quantity = "2"
    """CPU cores, as a quantity: 2 or 1500m."""
    memory: Memory = "8Gi"
    """Memory, as a quantity: 8Gi."""
    node_selector: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Labels of the node."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints of the node."""

    rules = (memory_rule("memory", "memory"),)


class GcsFaultTolerance(ApiModel):
    """Lets the Ray head restart without ending the replicas: its state lies in Redis."""

    redis_address: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """Address, such as redis:6379."""
    password: SecretKey | None = None
    """Password of the Redis."""


class Images(ApiModel):
    """Container images. `{version}` stands for the engine's version."""

    head: Image | None = None
    """Image of the Ray head. Default: this release's."""
    vllm: Image | None = Field(default=None, alias="vLLM")
    """Image of nodes that run vLLM."""
    sglang: Image | None = Field(default=None, alias="SGLang")
    """Image of nodes that run SGLang."""
    simulator: Image | None = None
    """Image of nodes that run the simulator. Default: the head's."""


class RayClusterSpec(ApiModel):
    """A Ray cluster that the operator makes through KubeRay."""

    version: Annotated[str, StringConstraints(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$", max_length=16)] = "2.60.0"
    """Version of Ray; the images must hold the same."""
    images: Images = Images()
    """Container images."""
    image_pull_secrets: Annotated[list[Label], Field(max_length=8)] = []
    """Secrets for pulling the images."""
    head: HeadSpec = HeadSpec()
    """The head pod."""
    gcs_fault_tolerance: GcsFaultTolerance | None = None
    """Lets the head restart without ending the replicas."""
    idle_timeout: Duration = "300s"
    """How long a node above `minNodes` stays without work."""
    service_account: ObjectName | None = None
    """ServiceAccount of the pods."""
    env_from_secrets: Annotated[list[Label], Field(max_length=16)] = []
    """Secrets whose keys become environment variables of the nodes: HF_TOKEN and the like."""
    model_claims: Annotated[list[Label], Field(max_length=16)] = []
    """PersistentVolumeClaims with models, for pvc:// sources."""


class RaySpec(ApiModel):
    """A Ray cluster: either one that is there, or one that the operator makes."""

    address: HttpUrl | None = None
    """Dashboard of a cluster that is there, such as http://ray-head:8265."""
    registry: HttpUrl | None = None
    """Registry of that cluster. Default: port 8267 of the address's host."""
    auth_token: SecretKey | None = None
    """Ray's authentication token of that cluster."""
    cluster: RayClusterSpec | None = None
    """A cluster to make through KubeRay."""

    rules = (
        Rule(
            cel="has(self.address) != has(self.cluster)",
            message="set either ray.address or ray.cluster",
            check=lambda self: (self.address is None) != (self.cluster is None),
            field="cluster",
        ),
        Rule(
            cel="has(self.address) || !(has(self.registry) || has(self.authToken))",
            message="ray.registry and ray.authToken go with ray.address",
            check=lambda self: (
                self.address is not None or (self.registry is None and self.auth_token is None)
            ),
            field="registry",
        ),
        _url_rule("address"),
        _url_rule("registry"),
    )


class ServingPoolSpec(ApiModel):
    """What the administrator wants."""

    ray: RaySpec
    """The Ray cluster."""
    accelerators: Annotated[
        list[AcceleratorGroup], Field(min_length=1, max_length=64, json_schema_extra={"x-map-key": "type"})
    ]
    """Nodes, by accelerator."""

    rules = (
        Rule(
            cel=HELD_BY_SCHEMA,
            message="each accelerator type stands once",
            check=lambda self: len({a.type for a in self.accelerators}) == len(self.accelerators),
            field="accelerators",
        ),
    )


class ServingPool(Resource):
    """One Ray cluster with its accelerators, on which models run."""

    kind: Literal["ServingPool"] = "ServingPool"
    """Kind of the resource."""
    spec: ServingPoolSpec
    """What the administrator wants."""
    status: ServingPoolStatus | None = None
    """Observed state; written by the operator."""

    def group(self, accelerator: str) -> AcceleratorGroup | None:
        """The group of an accelerator type."""
        return next((g for g in self.spec.accelerators if g.type == accelerator), None)
