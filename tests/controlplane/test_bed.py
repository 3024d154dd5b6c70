"""The test bed itself: what the other tests take for granted."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.controlplane.bed import (
    GPU,
    GPU_TOLERATION,
    Cluster,
    CommandError,
    ControlPlane,
    NodeGroup,
    Permission,
    StandIn,
    build,
    permissions,
    wait_until,
)
from tests.controlplane.bed import nodes as machines
from tests.controlplane.bed.process import http_ok
from tests.controlplane.pods import condition, gpu_pod, wait_ready

CHART = Path(__file__).parent / "testdata" / "capabilities"

pytestmark = pytest.mark.controlplane


def test_starts_in_under_thirty_seconds(
    control_plane: ControlPlane, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\ncontrol plane, seconds until ready: {control_plane.startup_seconds}")
    assert control_plane.startup_seconds["total"] < 30


def test_server_and_helm_report_the_pinned_versions(control_plane: ControlPlane) -> None:
    pinned = build.versions("kubernetes")
    server = json.loads(control_plane.kubectl("version", "-o", "json"))["serverVersion"]
    assert server["gitVersion"] == pinned["k8s.io/kubernetes"]
    assert int(server["minor"]) >= 34
    assert control_plane.helm("version", "--template={{.Version}}") == pinned["helm.sh/helm/v3"]
    assert f"kubeVersion: v1.{server['minor']}" in control_plane.helm("template", str(CHART))


def test_helm_installs_and_uninstalls(cluster: Cluster, namespace: str) -> None:
    cluster.helm("install", "mine", str(CHART), "-n", namespace, "--wait")
    server = json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    assert cluster.get("configmap", "capabilities", namespace)["data"] == {"kubeVersion": server}
    cluster.helm("uninstall", "mine", "-n", namespace, "--wait")
    assert cluster.find("configmap", "capabilities", namespace) is None


def test_everything_listens_on_loopback_only(control_plane: ControlPlane) -> None:
    listening = {
        (name, connection.laddr.ip)
        for name, pid in control_plane.pids.items()
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name for name, _ in listening} == set(control_plane.pids)
    assert {address for _, address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("group", machines.DEFAULT_FLEET, ids=lambda group: group.name)
def test_nodes_look_like_the_machines_they_stand_for(control_plane: ControlPlane, group: NodeGroup) -> None:
    for number in range(group.count):
        node = control_plane.get("node", f"{group.name}-{number}")
        labels, allocatable = node["metadata"]["labels"], node["status"]["allocatable"]
        assert condition(node, "Ready")["status"] == "True"
        if group.gpu is None:
            assert GPU not in allocatable
            assert "nvidia.com/gpu.present" not in labels
        else:
            assert allocatable[GPU] == node["status"]["capacity"][GPU] == str(group.gpus)
            assert labels["nvidia.com/gpu.product"] == group.gpu.product
            assert labels["nvidia.com/gpu.memory"] == str(group.gpu.memory_mib)
            assert labels["nvidia.com/gpu.count"] == str(group.gpus)
            assert machines.GPU_TAINT in node["spec"]["taints"]


def test_gpu_pod_is_scheduled_to_its_machine_and_ready(cluster: Cluster, namespace: str) -> None:
    pod = gpu_pod("engine", "Tesla-T4", 2, tolerations=[GPU_TOLERATION])
    cluster.apply(pod, namespace=namespace)
    ready = wait_ready(cluster, "pod", "engine", namespace)
    assert ready["spec"]["nodeName"].startswith("t4-")
    assert ready["status"]["podIP"].startswith("10.")


@pytest.mark.parametrize(
    ("pod", "why"),
    [
        (gpu_pod("tainted", "Tesla-T4", 1), "untolerated taint"),
        (gpu_pod("too-many", "Tesla-T4", 5, tolerations=[GPU_TOLERATION]), "Insufficient nvidia.com/gpu"),
        (gpu_pod("unknown", "NVIDIA-H100-80GB-HBM3", 1, tolerations=[GPU_TOLERATION]), "node affinity"),
    ],
    ids=lambda value: value["metadata"]["name"] if isinstance(value, dict) else "",
)
def test_scheduler_says_why_a_pod_fits_nowhere(
    cluster: Cluster, namespace: str, pod: dict[str, Any], why: str
) -> None:
    cluster.apply(pod, namespace=namespace)
    name = pod["metadata"]["name"]
    wait_until(
        lambda: why in condition(cluster.find("pod", name, namespace), "PodScheduled").get("message", ""),
        timeout=20,
        what=f"pod {name} unschedulable: {why}",
    )


def test_deployment_becomes_available_and_is_collected_with_its_pods(
    cluster: Cluster, namespace: str
) -> None:
    cluster.kubectl("create", "deployment", "web", "--image=web", "--replicas=3", "-n", namespace)
    cluster.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=30s")
    cluster.kubectl("delete", "deployment", "web", "-n", namespace, "--wait=false")
    wait_until(lambda: not cluster.list("pods", namespace), timeout=30, what="pods collected")


def test_a_process_of_this_machine_can_answer_for_a_pod(control_plane: ControlPlane, namespace: str) -> None:
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "web", "image": "web", "ports": [{"containerPort": 8080}]}]},
    }  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }  # fmt: skip
    control_plane.apply(pod, service, namespace=namespace)
    wait_ready(control_plane, "pod", "web", namespace)
    local = control_plane.ports.take()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, name="stand-in").start()
        control_plane.stand_in(StandIn(namespace, "web", {8080: server.server_port}))
        forward = subprocess.Popen(
            [build.kubectl_path(), "port-forward", "service/web", f"{local}:80", "-n", namespace],
            env={**os.environ, "KUBECONFIG": str(control_plane.kubeconfig())},
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: http_ok(f"http://127.0.0.1:{local}/"), timeout=20, what="an answer of the pod")
        finally:
            forward.kill()
            forward.wait()
            server.shutdown()


def test_job_completes(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "job", "once", "--image=once", "-n", namespace)
    cluster.kubectl("wait", "--for=condition=Complete", "job/once", "-n", namespace, "--timeout=30s")


def test_volume_claim_is_bound(cluster: Cluster, namespace: str) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}},
    }
    cluster.apply(claim, namespace=namespace)
    cluster.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/models", "-n", namespace)


def test_a_machine_can_come_and_go(control_plane: ControlPlane, namespace: str) -> None:
    h100 = machines.Gpu("NVIDIA-H100-80GB-HBM3", 81559, "hopper", (9, 0), mig_capable=True)
    pod = gpu_pod("engine", h100.product, 8, tolerations=[GPU_TOLERATION])
    control_plane.apply(pod, namespace=namespace)
    names = control_plane.add_nodes(NodeGroup("h100-spot", 1, h100, 8, spot=True))
    ready = wait_ready(control_plane, "pod", "engine", namespace)
    assert [ready["spec"]["nodeName"]] == names
    control_plane.remove_nodes(*names)
    wait_until(
        lambda: control_plane.find("pod", "engine", namespace) is None,
        timeout=10,
        what="the pod gone with its machine",
    )


WIDGET = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.bed.modelfleet.io}
spec:
  group: bed.modelfleet.io
  scope: Namespaced
  names: {plural: widgets, singular: widget, kind: Widget}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            properties:
              min: {type: integer, default: 1}
              max: {type: integer}
            x-kubernetes-validations:
            - {rule: self.min <= self.max, message: min is above max}
"""


def test_custom_resource_with_cel_and_defaults(cluster: Cluster, namespace: str) -> None:
    def widget(name: str, **spec: int) -> dict[str, Any]:
        return {
            "apiVersion": "bed.modelfleet.io/v1",
            "kind": "Widget",
            "metadata": {"name": name},
            "spec": spec,
        }

    cluster.apply(WIDGET)
    cluster.wait_for_crd("widgets.bed.modelfleet.io")
    cluster.apply(widget("good", max=2), namespace=namespace)
    assert cluster.get("widget", "good", namespace)["spec"] == {"min": 1, "max": 2}
    with pytest.raises(CommandError, match="min is above max"):
        cluster.apply(widget("bad", min=3, max=2), namespace=namespace)


def test_rbac_denies_and_the_audit_log_tells(control_plane: ControlPlane, namespace: str) -> None:
    since = control_plane.audit.position()
    stranger = control_plane.kubeconfig("alice", ["team-a"])
    with pytest.raises(CommandError, match='User "alice" cannot list resource "pods"'):
        control_plane.kubectl("get", "pods", "-n", namespace, kubeconfig=stranger)
    control_plane.kubectl(
        "create", "rolebinding", "team-a", "--clusterrole=view", "--group=team-a", "-n", namespace
    )

    def allowed() -> bool:  # the authorizer learns of the binding through its own watch
        answer = control_plane.kubectl("auth", "whoami", "-o", "json", kubeconfig=stranger)
        assert json.loads(answer)["status"]["userInfo"]["groups"] == ["team-a", "system:authenticated"]
        try:
            control_plane.kubectl("get", "pods", "-n", namespace, kubeconfig=stranger)
        except CommandError:
            return False
        return True

    wait_until(allowed, timeout=10, what="alice may list pods")
    denied = control_plane.audit.denied("alice", since)
    assert {(event.permission, event.namespace) for event in denied} == {
        (Permission("", "pods", "list"), namespace)
    }
    assert Permission("", "pods", "list") in control_plane.audit.used("alice", since)


def test_service_account_has_its_own_rights(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("create", "serviceaccount", "robot", "-n", namespace)
    control_plane.kubectl(
        "create", "role", "robot", "--verb=get,list", "--resource=configmaps", "-n", namespace
    )
    control_plane.kubectl(
        "create",
        "rolebinding",
        "robot",
        "--role=robot",
        f"--serviceaccount={namespace}:robot",
        "-n",
        namespace,
    )
    robot = control_plane.service_account_kubeconfig(namespace, "robot")

    def listed() -> bool:
        try:
            control_plane.kubectl("get", "configmaps", kubeconfig=robot)
        except CommandError:
            return False
        return True

    wait_until(listed, timeout=10, what="the robot may list")
    with pytest.raises(CommandError, match="cannot list resource"):
        control_plane.kubectl("get", "secrets", kubeconfig=robot)
    granted = permissions(control_plane.get("role", "robot", namespace)["rules"])
    used = control_plane.audit.used(f"system:serviceaccount:{namespace}:robot")
    assert granted - used == {Permission("", "configmaps", "get")}


def test_namespace_that_hangs_says_what_it_waits_for(cluster: Cluster) -> None:
    name = cluster.create_namespace()
    held = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "held", "finalizers": ["bed.io/held"]},
    }
    cluster.apply(held, namespace=name)
    with pytest.raises(TimeoutError, match=r"bed\.io/held"):
        cluster.delete_namespace(name, timeout=8)
    release = '{"metadata": {"finalizers": null}}'
    cluster.kubectl("patch", "configmap", "held", "-n", name, "--type=merge", "-p", release)
    wait_until(lambda: cluster.find("namespace", name) is None, timeout=60, what="the namespace gone")


RAY_CLUSTER = """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: small}
spec:
  rayVersion: 2.60.0
  headGroupSpec:
    rayStartParams: {}
    template:
      spec:
        containers:
        - {name: ray-head, image: ray, resources: {requests: {cpu: "1", memory: 4Gi}}}
  workerGroupSpecs:
  - groupName: a100
    replicas: 2
    minReplicas: 0
    maxReplicas: 4
    rayStartParams: {}
    template:
      spec:
        nodeSelector: {nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB}
        tolerations: [{key: nvidia.com/gpu, operator: Exists}]
        containers:
        - {name: ray-worker, image: ray, resources: {limits: {cpu: "4", memory: 16Gi, nvidia.com/gpu: "8"}}}
"""


def test_kuberay_makes_a_cluster_ready(kuberay_operator: ControlPlane, namespace: str) -> None:
    kuberay_operator.apply(RAY_CLUSTER, namespace=namespace)
    wait_until(
        lambda: (
            kuberay_operator.get("raycluster", "small", namespace).get("status", {}).get("state") == "ready"
        ),
        timeout=60,
        what="RayCluster ready",
    )
    status = kuberay_operator.get("raycluster", "small", namespace)["status"]
    assert status["availableWorkerReplicas"] == 2
    assert status["desiredGPU"] == "16"
    pods = kuberay_operator.list("pods", namespace, "ray.io/node-type=worker")
    assert {pod["spec"]["nodeName"] for pod in pods} == {"a100-80g-0", "a100-80g-1"}
    denied = kuberay_operator.audit.denied("system:serviceaccount:kuberay-system:kuberay-operator")
    assert denied == []
