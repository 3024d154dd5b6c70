"""The real KubeRay operator against a control plane, with its own CRDs and its own permissions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from tests.controlplane.bed.build import Report, ensure, module_dir, to_stderr
from tests.controlplane.bed.control_plane import ControlPlane

NAMESPACE = "kuberay-system"
NAME = "kuberay-operator"


def install_crds(control_plane: ControlPlane) -> list[str]:
    """Apply KubeRay's CRDs out of its Go module and return their names, ready for use."""
    bases = _config() / "crd" / "bases"
    # Server-side: they are too large for the annotation that a client-side apply writes.
    control_plane.kubectl("apply", "--server-side", "-f", str(bases))
    # GROUP_PLURAL.yaml, as controller-gen names them. Not parsed: that takes Python seconds.
    parts = (file.stem.partition("_") for file in sorted(bases.glob("*.yaml")))
    names = [f"{plural}.{group}" for group, _, plural in parts]
    control_plane.wait_for_crd(*names)
    return names


def install(control_plane: ControlPlane, *, report: Report = to_stderr) -> None:
    """Install KubeRay: CRDs, ServiceAccount with the released ClusterRole, the operator as a process.

    It is the component ``kuberay-operator`` of the control plane from then on.

    Raises:
        BuildError: the operator can't be built.
        ComponentError: it does not come up.
    """
    program = ensure([NAME], report=report)[NAME]
    install_crds(control_plane)
    control_plane.apply(*_rbac())
    kubeconfig = control_plane.service_account_kubeconfig(NAMESPACE, NAME)
    metrics, health = control_plane.ports.take(), control_plane.ports.take()
    control_plane.run_component(
        control_plane.component(
            NAME,
            [
                str(program),
                f"--kubeconfig={kubeconfig}",
                f"--metrics-addr=127.0.0.1:{metrics}",
                f"--health-probe-bind-address=127.0.0.1:{health}",
                "--enable-leader-election=false",
            ],
            f"http://127.0.0.1:{health}/readyz",
            {**os.environ, "POD_NAMESPACE": NAMESPACE},
        )
    )


def _config() -> Path:
    return module_dir("kuberay", "github.com/ray-project/kuberay/ray-operator") / "config"


def _rbac() -> list[dict[str, Any]]:
    role = yaml.safe_load((_config() / "rbac" / "role.yaml").read_text())
    role["metadata"]["name"] = NAME
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME, "namespace": NAMESPACE}},
        role,
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": NAME},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME},
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
        },
    ]
