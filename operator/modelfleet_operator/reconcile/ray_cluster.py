"""The KubeRay RayCluster of a pool that the operator makes.

One worker group for each accelerator group and engine image: the node that the autoscaler adds for a replica
holds its engine. The image is chosen by a custom Ray resource of the engine beside that of the accelerator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from modelfleet_operator.api import AcceleratorGroup, ServingPool, duration_seconds
from modelfleet_operator.api.base import GROUP
from modelfleet_operator.api.serving_pool import GcsFaultTolerance, RayClusterSpec, Toleration
from modelfleet_operator.catalog.accelerators import accelerator
from modelfleet_operator.catalog.engines import default_version
from modelfleet_operator.planner.inputs import ray_resource
from modelfleet_operator.reconcile.applications import engine_resource
from modelfleet_serving.contract import REGISTRY_PORT

POOL_LABEL: Final = f"{GROUP}/pool"
APPLIED: Final = f"{GROUP}/applied"
DASHBOARD_PORT: Final = 8265
TOKEN_KEY: Final = "auth_token"  # noqa: S105  the key's name is KubeRay's
MARKS_PER_NODE: Final = 1000
"""Amount of a marking resource on each node; a replica takes a thousandth of one, so it never runs out."""
MODELS_ROOT: Final = "/mnt/models"
_GPU_TOLERATION: Final = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
_RESTRICTED: Final = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_RAY_USER: Final = 1000
_DRAIN_SECONDS: Final = 660
"""A pod's grace: longer than a replica's default drain timeout."""


@dataclass(frozen=True)
class EngineImages:
    """Images with all defaults filled in."""

    head: str
    vllm: str
    sglang: str
    simulator: str


def engine_images(spec: RayClusterSpec, head: str, vllm: str, sglang: str) -> EngineImages:
    """A pool's images over the release's."""
    chosen = spec.images.head or head
    return EngineImages(
        head=chosen,
        vllm=_of_version(spec.images.vllm or vllm, "vLLM"),
        sglang=_of_version(spec.images.sglang or sglang, "SGLang"),
        simulator=spec.images.simulator or chosen,
    )


def _of_version(image: str, engine: str) -> str:
    return image.replace("{version}", default_version(engine) or "latest")


def cluster_name(pool: ServingPool) -> str:
    """Name of a pool's RayCluster."""
    return pool.metadata.name


def token_secret_name(pool: ServingPool) -> str:
    """Name of the Secret with the token of a pool's cluster."""
    return f"{pool.metadata.name}-ray-token"


def head_address(pool: ServingPool, port: int) -> str:
    """URL of a port of the head, through the Service that KubeRay makes."""
    return f"http://{cluster_name(pool)}-head-svc.{pool.metadata.namespace}.svc:{port}"


def owner_reference(pool: ServingPool) -> dict[str, Any]:
    """The pool as owner: its objects go with it."""
    return {
        "apiVersion": pool.api_version,
        "kind": pool.kind,
        "name": pool.metadata.name,
        "uid": pool.metadata.uid,
        "controller": True,
    }


def labels_of(pool: ServingPool) -> dict[str, str]:
    """Labels of everything that is made for a pool."""
    return {
        POOL_LABEL: pool.metadata.name,
        "app.kubernetes.io/name": "modelfleet",
        "app.kubernetes.io/instance": pool.metadata.name,
        "app.kubernetes.io/component": "ray",
        "app.kubernetes.io/managed-by": "modelfleet-operator",
    }


def token_secret(pool: ServingPool, token: str) -> dict[str, Any]:
    """The Secret with the cluster's token."""
    return {
        "metadata": _metadata(pool, token_secret_name(pool)),
        "type": "Opaque",
        "stringData": {TOKEN_KEY: token},
    }


def _metadata(pool: ServingPool, name: str) -> dict[str, Any]:
    """Of a child of the pool, which goes with it."""
    return {
        "name": name,
        "namespace": pool.metadata.namespace,
        "labels": labels_of(pool),
        "ownerReferences": [owner_reference(pool)],
    }


def ray_cluster(
    pool: ServingPool, images: EngineImages, running: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The RayCluster as it shall be, without apiVersion and kind.

    Args:
        pool: the resource; ``spec.ray.cluster`` is set.
        images: with all defaults filled in.
        running: the cluster as it is. The number of workers is the autoscaler's: the list of groups can only
            be written as a whole, so what stands there is kept.
    """
    spec = pool.spec.ray.cluster
    if spec is None:
        raise ValueError(f"pool {pool.key} has the address of a cluster that is there already")
    body = _spec(pool, spec, images, {})
    # Of everything we ask for: without it nobody would see that a field is no longer wanted.
    content = msgspec.json.encode(body, order="deterministic")
    metadata = _metadata(pool, cluster_name(pool))
    metadata["annotations"] = {APPLIED: hashlib.sha256(content).hexdigest()[:16]}
    return {"metadata": metadata, "spec": _spec(pool, spec, images, _autoscaled(running))}


def _spec(
    pool: ServingPool,
    spec: RayClusterSpec,
    images: EngineImages,
    replicas: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "rayVersion": spec.version,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": int(duration_seconds(spec.idle_timeout)),
            "securityContext": _RESTRICTED | {"runAsUser": _RAY_USER},
        },
        "authOptions": {"mode": "token", "secretName": token_secret_name(pool)},
        "headGroupSpec": {
            # No CPUs: replicas belong on workers, whatever happens to them.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},  # noqa: S104  a pod's port
            "template": _head(pool, spec, images),
        },
        "workerGroupSpecs": [
            _with_replicas(_worker_group(pool, spec, group, engines, image), replicas)
            for group in pool.spec.accelerators
            for engines, image in _engines_on(group, images)
        ],
    }
    if spec.gcs_fault_tolerance is not None:
        body["gcsFaultToleranceOptions"] = _fault_tolerance(spec.gcs_fault_tolerance)
    return body


def _fault_tolerance(tolerance: GcsFaultTolerance) -> dict[str, Any]:
    options: dict[str, Any] = {"redisAddress": tolerance.redis_address}
    if tolerance.password is not None:
        secret = {"name": tolerance.password.name, "key": tolerance.password.key}
        options["redisPassword"] = {"valueFrom": {"secretKeyRef": secret}}
    return options


def _autoscaled(running: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    groups = (running or {}).get("spec", {}).get("workerGroupSpecs") or []
    kept = ("replicas", "scaleStrategy")
    return {g["groupName"]: {name: g[name] for name in kept if name in g} for g in groups}


def _with_replicas(group: dict[str, Any], running: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    kept = running.get(group["groupName"], {})
    wanted = kept.get("replicas", group["minReplicas"])
    bounded = min(max(wanted, group["minReplicas"]), group["maxReplicas"])
    strategy = {"scaleStrategy": kept["scaleStrategy"]} if kept.get("scaleStrategy") else {}
    return group | {"replicas": bounded} | strategy


def _engines_on(group: AcceleratorGroup, images: EngineImages) -> list[tuple[tuple[str, ...], str]]:
    """Engines by image for nodes of a group; engines with one image share their nodes."""
    known = accelerator(group.type)
    on_cpu = known is not None and known.is_cpu
    second = ("simulator", images.simulator) if on_cpu else ("sglang", images.sglang)
    by_image: dict[str, list[str]] = {}
    for engine, image in (("vllm", images.vllm), second):
        by_image.setdefault(image, []).append(engine)
    return [(tuple(engines), image) for image, engines in by_image.items()]


def group_name(group: AcceleratorGroup, engine: str) -> str:
    """Name of a worker group; KubeRay makes pod names of it."""
    return f"{group.type.lower().replace('.', '-').replace('_', '-')}-{engine}"


def _worker_group(
    pool: ServingPool, spec: RayClusterSpec, group: AcceleratorGroup, engines: tuple[str, ...], image: str
) -> dict[str, Any]:
    known = accelerator(group.type)
    resource = known.resource if known else "nvidia.com/gpu"
    marks = dict.fromkeys([ray_resource(group.type), *map(engine_resource, engines)], MARKS_PER_NODE)
    start = {"resources": json.dumps(json.dumps(marks, separators=(",", ":")))}
    if group.gpus_per_node and resource:
        start["num-gpus"] = str(group.gpus_per_node)
    container = _container(spec, "ray-worker", image) | {"resources": _resources(group, resource)}
    pod = _pod(spec, container)
    selector = dict(group.node_selector) or _product_selector(group)
    if selector:
        pod["nodeSelector"] = selector
    if len(labels := known.product_labels if known and not group.node_selector else ()) > 1:
        pod.pop("nodeSelector", None)
        pod["affinity"] = _any_product(labels)
    tolerations = [_toleration(t) for t in group.tolerations]
    if group.gpus_per_node and resource and resource.startswith("nvidia.com/"):
        tolerations.append(_GPU_TOLERATION)
    if tolerations:
        pod["tolerations"] = tolerations
    return {
        "groupName": group_name(group, engines[0]),
        "minReplicas": group.min_nodes if "vllm" in engines else 0,
        "maxReplicas": group.max_nodes,
        "rayStartParams": start,
        "template": {"metadata": {"labels": labels_of(pool)}, "spec": pod},
    }


def _product_selector(group: AcceleratorGroup) -> dict[str, str]:
    known = accelerator(group.type)
    labels = known.product_labels if known else ()
    return {"nvidia.com/gpu.product": labels[0]} if labels else {}


def _any_product(labels: tuple[str, ...]) -> dict[str, Any]:
    term = {"matchExpressions": [{"key": "nvidia.com/gpu.product", "operator": "In", "values": list(labels)}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


def _resources(group: AcceleratorGroup, resource: str | None) -> dict[str, Any]:
    requests: dict[str, str] = {}
    if group.cpus_per_node:
        requests["cpu"] = group.cpus_per_node
    if group.memory_per_node:
        requests["memory"] = group.memory_per_node
    limits = {k: v for k, v in requests.items() if k == "memory"}
    if group.gpus_per_node and resource:
        requests[resource] = limits[resource] = str(group.gpus_per_node)
    return {"requests": requests, "limits": limits}


def _head(pool: ServingPool, spec: RayClusterSpec, images: EngineImages) -> dict[str, Any]:
    container = _container(spec, "ray-head", images.head) | {
        "resources": {
            "requests": {"cpu": spec.head.cpu, "memory": spec.head.memory},
            "limits": {"memory": spec.head.memory},
        },
        "ports": [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": DASHBOARD_PORT},
            {"name": "client", "containerPort": 10001},
            {"name": "registry", "containerPort": REGISTRY_PORT},
        ],
    }
    pod = _pod(spec, container)
    if spec.head.node_selector:
        pod["nodeSelector"] = dict(spec.head.node_selector)
    if spec.head.tolerations:
        pod["tolerations"] = [_toleration(t) for t in spec.head.tolerations]
    return {"metadata": {"labels": labels_of(pool)}, "spec": pod}


def _container(spec: RayClusterSpec, name: str, image: str) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "securityContext": dict(_RESTRICTED),
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
    }
    if spec.env_from_secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in spec.env_from_secrets]
    if spec.model_claims:
        container["volumeMounts"] = [
            {"name": _volume_name(number), "mountPath": f"{MODELS_ROOT}/{claim}", "readOnly": True}
            for number, claim in enumerate(spec.model_claims)
        ]
    return container


def _pod(spec: RayClusterSpec, container: dict[str, Any]) -> dict[str, Any]:
    shared = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    container["volumeMounts"] = [
        *container.get("volumeMounts", ()),
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108  tensors pass between an engine's ranks
    ]
    pod: dict[str, Any] = {
        "containers": [container],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _RAY_USER,
            "fsGroup": _RAY_USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": _DRAIN_SECONDS,
        "volumes": [
            *(
                {
                    "name": _volume_name(number),
                    "persistentVolumeClaim": {"claimName": claim, "readOnly": True},
                }
                for number, claim in enumerate(spec.model_claims)
            ),
            shared,
        ],
    }
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in spec.image_pull_secrets]
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    return pod


def _volume_name(number: int) -> str:
    return f"models-{number}"


def _toleration(toleration: Toleration) -> dict[str, Any]:
    return toleration.to_dict()


def differs(wanted: Any, actual: Any) -> bool:
    """Whether a field that we own stands otherwise; fields of others are not looked at."""
    if isinstance(wanted, Mapping):
        return not isinstance(actual, Mapping) or any(differs(v, actual.get(k)) for k, v in wanted.items())
    if isinstance(wanted, list):
        return not isinstance(actual, list) or len(wanted) != len(actual) or any(map(differs, wanted, actual))
    return bool(wanted != actual)
