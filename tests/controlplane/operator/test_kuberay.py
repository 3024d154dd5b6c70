"""Pools that the operator makes through KubeRay, with the real KubeRay operator on simulated nodes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.controlplane.bed import ControlPlane, wait_until
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.world import GROUP

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(180)]

POOL = {
    "apiVersion": GROUP,
    "kind": "ServingPool",
    "metadata": {"name": "made"},
    "spec": {
        "ray": {"cluster": {"envFromSecrets": ["hub"], "modelClaims": ["models"], "idleTimeout": "120s"}},
        "accelerators": [
            {"type": "A10", "gpusPerNode": 1, "minNodes": 1, "maxNodes": 4},
            {"type": "T4", "gpusPerNode": 1, "minNodes": 0, "maxNodes": 2},
        ],
    },
}


@pytest.fixture
def operator(
    kuberay_operator: ControlPlane, namespace: str, service_account: Path, tmp_path: Path
) -> Iterator[OperatorProcess]:
    process = OperatorProcess(
        service_account, tmp_path / "operator.log", prepared=True, WATCH_NAMESPACES=namespace
    )
    with process:
        process.wait_ready()
        yield process


def test_makes_and_keeps_a_cluster(
    kuberay_operator: ControlPlane, namespace: str, operator: OperatorProcess
) -> None:
    plane = kuberay_operator
    claim = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }  # fmt: skip
    hub = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"HF_TOKEN": "x"}}
    plane.apply(claim, hub, POOL, namespace=namespace)
    wait_until(
        lambda: plane.find("raycluster", "made", namespace) is not None, timeout=30, what="the RayCluster"
    )

    token = plane.get("secret", "made-ray-token", namespace)
    assert len(base64.b64decode(token["data"]["auth_token"])) >= 32
    assert token["metadata"]["ownerReferences"][0]["kind"] == "ServingPool"

    # KubeRay makes the pods of it, and the scheduler finds nodes for them.
    def placed() -> dict[str, str]:
        pods = plane.list("pods", namespace, "ray.io/cluster=made")
        return {p["metadata"]["labels"]["ray.io/group"]: p["spec"].get("nodeName", "") for p in pods}

    wait_until(lambda: {"headgroup", "a10-vllm"} <= placed().keys() and all(placed().values()), timeout=60,
               what="pods on nodes")  # fmt: skip
    assert placed()["a10-vllm"].startswith("a10-")
    head = next(p for p in plane.list("pods", namespace, "ray.io/node-type=head"))
    environment = {e["name"]: e for e in head["spec"]["containers"][0]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "made-ray-token"
    ports = {p["name"]: p["port"] for p in plane.get("service", "made-head-svc", namespace)["spec"]["ports"]}
    assert ports["registry"] == 8267
    assert ports["dashboard"] == 8265

    status = plane.get("spool", "made", namespace)["status"]
    assert status["address"] == f"http://made-head-svc.{namespace}.svc:8265"

    # A field of ours that somebody edits comes back; the autoscaler's number of workers is left alone.
    cluster = plane.get("raycluster", "made", namespace)
    groups = cluster["spec"]["workerGroupSpecs"]
    assert [g["groupName"] for g in groups] == ["a10-vllm", "a10-sglang", "t4-vllm", "t4-sglang"]
    patch = [
        {"op": "replace", "path": "/spec/workerGroupSpecs/0/maxReplicas", "value": 99},
        {"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": 3},
        {"op": "add", "path": "/metadata/annotations", "value": {"theirs": "kept"}},
    ]
    plane.kubectl("patch", "raycluster", "made", "-n", namespace, "--type=json", "-p", json.dumps(patch))

    def repaired() -> bool:
        found = plane.get("raycluster", "made", namespace)
        group = found["spec"]["workerGroupSpecs"][0]
        return bool(group["maxReplicas"] == 4 and group["replicas"] == 3)

    wait_until(repaired, timeout=20, what="maxReplicas repaired and replicas kept")
    assert plane.get("raycluster", "made", namespace)["metadata"]["annotations"]["theirs"] == "kept"
    generation = plane.get("raycluster", "made", namespace)["metadata"]["generation"]

    # The pool's end is the cluster's.
    plane.kubectl("delete", "spool", "made", "-n", namespace, "--timeout=20s")
    wait_until(
        lambda: plane.find("raycluster", "made", namespace) is None, timeout=60, what="the cluster gone"
    )
    assert generation < 10, "a cluster that is as it shall be is not written again"
