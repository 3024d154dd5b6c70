"""The operator under its own ServiceAccount, installed by Helm: nothing is refused, nothing given in vain."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.chart.conftest import condition, remove_crds
from tests.chart.rendered import CHART
from tests.controlplane.bed import CommandError, ControlPlane, Permission, permissions, wait_until
from tests.controlplane.operator.processes import OperatorProcess, RegistryProcess
from tests.controlplane.operator.standin import RayStandIn, RayThread

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(240)]

API = "modelfleet.io/v1alpha1"
UNSEEN = {
    # Server-side apply of what is not there yet: a patch in the audit log, both for the authorizer.
    Permission("ray.io", "rayclusters", "create"),
    # Asked for by the admission plugin OwnerReferencesPermissionEnforcement, which is off here.
    Permission("modelfleet.io", "servingpools/finalizers", "update"),
}


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[RayThread]:
    with RegistryProcess(tmp_path, secrets.token_hex(16)) as registry:
        registry.wait_ready()
        with RayThread(RayStandIn(registry=registry.url, token=registry.token)) as thread:
            yield thread


@pytest.fixture
def installed(kuberay_operator: ControlPlane, system: str) -> Iterator[ControlPlane]:
    remove_crds(kuberay_operator)
    nodes = [{"type": "CPU", "gpusPerNode": 0, "cpusPerNode": "2", "minNodes": 1, "maxNodes": 2}]
    options = ["--set", "operator.letGoSeconds=3", "--set-json", f"pool.accelerators={json.dumps(nodes)}"]
    kuberay_operator.helm("install", "modelfleet", str(CHART), "-n", system, *options)
    yield kuberay_operator
    kuberay_operator.helm("uninstall", "modelfleet", "-n", system, "--wait", "--no-hooks")
    remove_crds(kuberay_operator)


def environment(cluster: ControlPlane, namespace: str) -> dict[str, str]:
    """The operator's settings as its pod has them."""
    pod = cluster.get("deployment", "modelfleet-operator", namespace)["spec"]["template"]["spec"]
    ours = {v["name"].removeprefix("MODELFLEET_"): v for v in pod["containers"][0]["env"]}
    given = {name: v["value"] for name, v in ours.items() if "value" in v and v["name"] != name}
    return {name: value for name, value in given.items() if name != "LISTEN"}


def deployment(weight: int) -> dict[str, Any]:
    variants = [{"name": n, "accelerators": [{"type": "A10"}]} for n in ("a", "b")]
    return {
        "apiVersion": API,
        "kind": "ModelDeployment",
        "metadata": {"name": "m"},
        "spec": {
            "pool": "shared",
            "model": {"source": "hf://o/n"},
            "engine": {"type": "Simulator"},
            "variants": variants,
            "routing": {"weights": {"a": weight, "b": 1}},
        },
    }


def pool(ray: RayThread) -> list[dict[str, Any]]:
    where = {"address": ray.url, "registry": ray.ray.registry, "authToken": {"name": "ray", "key": "token"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "ray"},
            "stringData": {"token": ray.ray.token},
        },
        {
            "apiVersion": API,
            "kind": "ServingPool",
            "metadata": {"name": "shared"},
            "spec": {"ray": where, "accelerators": [{"type": "A10", "gpusPerNode": 4, "maxNodes": 2}]},
        },
    ]


def test_rights_are_exactly_those_needed(
    installed: ControlPlane, system: str, namespace: str, ray: RayThread, tmp_path: Path
) -> None:
    cluster, user = installed, f"system:serviceaccount:{system}:modelfleet-operator"
    since = cluster.audit.position()
    account = cluster.service_account_kubeconfig(system, "modelfleet-operator")
    settings = environment(cluster, system)
    assert settings["LEADER_ELECTION"] == "true"
    with OperatorProcess(account, tmp_path / "operator.log", system, **settings) as operator:
        operator.wait_ready()

        def holds(kind: str, name: str, where: str, what: str, status: str = "True") -> None:
            def reached() -> bool:
                assert not operator.ended(), operator.text()[-4000:]
                return condition(cluster.find(kind, name, where) or {}, what) == status

            wait_until(reached, timeout=40, what=f"{what} of {kind} {name}")

        # The chart's pool through KubeRay, in a namespace with the restricted Pod Security Standard.
        wait_until(
            lambda: cluster.find("secret", "default-ray-token", system) is not None,
            timeout=20,
            what="the token that the routers mount",
        )
        for role in ("head", "worker"):
            selector = f"ray.io/node-type={role},modelfleet.io/pool=default"
            wait_until(
                lambda s=selector: bool(cluster.list("pods", system, s)),  # type: ignore[misc]
                timeout=40,
                what=f"the Ray {role} of the chart's pool",
            )
        service = cluster.get("service", "default-head-svc", system)
        assert 8267 in {p["port"] for p in service["spec"]["ports"]}, "routers look for the registry there"

        # The life of a ModelDeployment, its pool in the operator's namespace.
        cluster.apply(*pool(ray), namespace=system)
        cluster.apply(deployment(1), namespace=namespace)
        holds("mdep", "m", namespace, "Ready")
        cluster.apply(deployment(9), namespace=namespace)
        cluster.apply(deployment(9) | {"metadata": {"name": "twin"}}, namespace=namespace)
        holds("mdep", "twin", namespace, "Ready")
        cluster.kubectl("delete", "mdep", "m", "twin", "-n", namespace, "--timeout=30s")
        wait_until(
            lambda: not cluster.get("servingpool", "shared", system)["status"].get("usedBy"),
            timeout=20,
            what="nobody uses the pool",
        )
        cluster.kubectl("delete", "servingpool", "shared", "default", "-n", system, "--timeout=30s")
        wait_until(
            lambda: cluster.find("raycluster", "default", system) is None,
            timeout=60,
            what="the RayCluster gone",
        )
        wait_until(
            lambda: Permission("coordination.k8s.io", "leases", "update") in cluster.audit.used(user, since),
            timeout=20,
            what="a renewed Lease",
        )
        # Events are written in the background.
        wait_until(
            lambda: Permission("events.k8s.io", "events", "create") in cluster.audit.used(user, since),
            timeout=10,
            what="an event",
        )
        assert operator.stop() < 5
    granted = permissions(cluster.get("clusterrole", f"modelfleet-operator.{system}")["rules"])
    granted |= permissions(cluster.get("role", "modelfleet-operator-lease", system)["rules"])
    assert [(e.verb, e.uri) for e in cluster.audit.denied(user, since)] == []
    assert granted - cluster.audit.used(user, since) == UNSEEN
    assert "Traceback" not in operator.text()


def test_rights_in_named_namespaces_suffice_there(
    kuberay_operator: ControlPlane, system: str, namespace: str, ray: RayThread, tmp_path: Path
) -> None:
    cluster, user = kuberay_operator, f"system:serviceaccount:{system}:modelfleet-operator"
    remove_crds(cluster)
    options = ["--set", f"operator.watchNamespaces={{{system},{namespace}}}", "--set", "pool.create=false"]
    options += ["--set", "router.registry=http://registry:8267"]
    cluster.helm("install", "modelfleet", str(CHART), "-n", system, *options)
    try:
        since = cluster.audit.position()
        account = cluster.service_account_kubeconfig(system, "modelfleet-operator")
        settings = environment(cluster, system)
        assert settings["WATCH_NAMESPACES"] == f"{system},{namespace}"
        cluster.apply(*pool(ray), namespace=system)
        with OperatorProcess(account, tmp_path / "operator.log", system, **settings) as operator:
            operator.wait_ready()
            cluster.apply(deployment(1), namespace=namespace)

            def ready() -> bool:
                assert not operator.ended(), operator.text()[-4000:]
                return condition(cluster.get("mdep", "m", namespace), "Ready") == "True"

            wait_until(ready, timeout=40, what="the ModelDeployment ready")
            cluster.kubectl("delete", "mdep", "m", "-n", namespace, "--timeout=30s")
        assert [(e.verb, e.uri) for e in cluster.audit.denied(user, since)] == []
        elsewhere = ("auth", "can-i", "get", "secrets", "-n", "kube-system", f"--as={user}")
        with pytest.raises(CommandError):
            cluster.kubectl(*elsewhere)
    finally:
        cluster.helm("uninstall", "modelfleet", "-n", system, "--wait", "--no-hooks")
        remove_crds(cluster)


def test_the_routers_account_can_do_nothing(installed: ControlPlane, system: str) -> None:
    pod = installed.get("deployment", "modelfleet-router", system)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    user = f"system:serviceaccount:{system}:modelfleet-router"
    for request in (("get", "secrets"), ("list", "pods"), ("get", "modeldeployments.modelfleet.io")):
        with pytest.raises(CommandError) as answer:
            installed.kubectl("auth", "can-i", *request, "-n", system, f"--as={user}")
        assert answer.value.stdout.strip() == "no"
