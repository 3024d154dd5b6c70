"""What lies in manifests/: an installation without Helm, and samples that the API server takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.chart.conftest import remove_crds
from tests.chart.rendered import ROOT, SYSTEM
from tests.controlplane.bed import ControlPlane

MANIFESTS = ROOT / "manifests"
SAMPLES = sorted((MANIFESTS / "samples").glob("*.yaml"))
CRDS = ("modeldeployments.modelfleet.io", "servingpools.modelfleet.io")

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def installed(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """`kubectl apply -k` on a cluster without anything of ours."""
    remove_crds(control_plane)
    control_plane.kubectl("delete", "namespace", SYSTEM, "--ignore-not-found", "--timeout=60s")
    control_plane.kubectl("apply", "--server-side", "-k", str(MANIFESTS))
    control_plane.wait_for_crd(*CRDS)
    yield control_plane
    remove_crds(control_plane)
    control_plane.kubectl("delete", "-k", str(MANIFESTS), "--ignore-not-found", "--wait=false")


def test_installs_without_helm(installed: ControlPlane) -> None:
    for name in ("modelfleet-operator", "modelfleet-router"):
        installed.kubectl("rollout", "status", f"deployment/{name}", "-n", SYSTEM, "--timeout=60s")
    account = f"--as=system:serviceaccount:{SYSTEM}:modelfleet-operator"

    def may(*request: str) -> bool:
        return installed.kubectl("auth", "can-i", *request, account).strip() == "yes"

    assert may("watch", "modeldeployments.modelfleet.io", "--all-namespaces")
    assert may("update", "leases.coordination.k8s.io/modelfleet-operator", "-n", SYSTEM)
    # Again: nothing in it fights with what the cluster made of it.
    assert "configured" not in installed.kubectl("apply", "--server-side", "-k", str(MANIFESTS))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_samples_are_accepted(installed: ControlPlane, namespace: str, sample: Path) -> None:
    installed.kubectl("apply", "--server-side", "--validate=strict", "-n", namespace, "-f", str(sample))
    for document in yaml.safe_load_all(sample.read_text()):
        stored = installed.get(document["kind"].lower(), document["metadata"]["name"], namespace)
        assert stored["metadata"]["generation"] == 1
