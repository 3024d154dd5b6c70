"""The chart against a control plane of its own, which has never seen our CRDs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.chart.rendered import SYSTEM
from tests.controlplane.bed import Cluster, CommandError, ControlPlane, kuberay, wait_until


@pytest.fixture(scope="session")
def control_plane(request: pytest.FixtureRequest) -> Iterator[ControlPlane]:
    """A control plane for the chart's tests alone: it must never have seen our CRDs."""
    if request.config.option.kubeconfig is not None:
        pytest.skip("installs and removes CRDs: not on the cluster of --kubeconfig")
    with ControlPlane() as own:
        yield own
        if request.session.testsfailed:
            own.keep_logs(request.config.rootpath / "build" / "chart-logs")


@pytest.fixture(scope="session")
def kuberay_operator(control_plane: ControlPlane) -> ControlPlane:
    """The same with KubeRay at work."""
    kuberay.install(control_plane)
    return control_plane


@pytest.fixture
def system(control_plane: ControlPlane) -> str:
    """The namespace of the installation; its pods are held to the strictest of the Pod Security Standards."""

    def leaving() -> bool:
        return "deletionTimestamp" in (control_plane.find("namespace", SYSTEM) or {}).get("metadata", {})

    wait_until(lambda: not leaving(), timeout=60, what=f"the last test's {SYSTEM} gone")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    control_plane.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": labels}}
    )
    return SYSTEM


def condition(found: dict[str, object], kind: str) -> str:
    """Status of a condition."""
    status = found.get("status")
    conditions = status.get("conditions", []) if isinstance(status, dict) else []
    return next((c["status"] for c in conditions if c["type"] == kind), "")


def remove_crds(cluster: Cluster) -> None:
    """Leave no trace: the resources of our CRDs without their finalizers, and the CRDs."""
    for plural in ("modeldeployments", "servingpools"):
        name = f"{plural}.modelfleet.io"
        if cluster.find("crd", name) is None:
            continue
        for item in cluster.list(name):
            where = ("-n", item["metadata"]["namespace"], name, item["metadata"]["name"])
            try:
                cluster.kubectl("patch", *where, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
            except CommandError as error:  # its namespace may have been on its way out, and is gone now
                if "(NotFound)" not in error.stderr:
                    raise
        cluster.kubectl("delete", "crd", name, "--timeout=30s")
