"""The operator against the real control plane, a real registry, and a stand-in for Ray."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.controlplane.bed import Cluster
from tests.controlplane.operator.processes import OperatorProcess, RegistryProcess
from tests.controlplane.operator.standin import RayStandIn, RayThread
from tests.controlplane.operator.world import World

MANIFESTS = Path(__file__).parents[3] / "manifests"
SYSTEM = "modelfleet-system"
OPERATOR = "modelfleet-operator"


@pytest.fixture(scope="session")
def crds(cluster: Cluster) -> Cluster:
    """The cluster with our CRDs and the admission policy."""
    cluster.kubectl("apply", "--server-side", "-f", str(MANIFESTS / "crds"))
    cluster.kubectl("apply", "--server-side", "-f", str(MANIFESTS / "admission"))
    cluster.wait_for_crd("modeldeployments.modelfleet.io", "servingpools.modelfleet.io")
    return cluster


@pytest.fixture(scope="session")
def service_account(crds: Cluster) -> Path:
    """Kubeconfig of the operator's ServiceAccount, with the permissions that the manifests give it."""
    roles = [yaml.safe_load((MANIFESTS / "rbac" / f"{n}.yaml").read_text()) for n in ("clusterrole", "role")]
    roles[1]["metadata"]["namespace"] = SYSTEM
    subject = [{"kind": "ServiceAccount", "name": OPERATOR, "namespace": SYSTEM}]
    group = "rbac.authorization.k8s.io"
    crds.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": OPERATOR, "namespace": SYSTEM}},
        *roles,
        *(
            {
                "apiVersion": f"{group}/v1",
                "kind": f"{role['kind']}Binding",
                "metadata": {"name": OPERATOR, **({"namespace": SYSTEM} if role["kind"] == "Role" else {})},
                "roleRef": {"apiGroup": group, "kind": role["kind"], "name": OPERATOR},
                "subjects": subject,
            }
            for role in roles
        ),
    )
    return crds.service_account_kubeconfig(SYSTEM, OPERATOR)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """A registry for all tests: one that has just started takes its time. Each operator takes it over."""
    with RegistryProcess(tmp_path_factory.mktemp("registry"), secrets.token_hex(16)) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def ray(registry: RegistryProcess) -> Iterator[RayThread]:
    """A stand-in for Ray whose replicas report to the registry."""
    with RayThread(RayStandIn(registry=registry.url, token=registry.token)) as thread:
        yield thread


@pytest.fixture
def world(
    crds: Cluster,
    namespace: str,
    service_account: Path,
    registry: RegistryProcess,
    ray: RayThread,
    tmp_path: Path,
) -> World:
    """A namespace with a pool on the stand-in; the operator is not started yet."""
    world = World(crds, namespace, registry, ray, service_account, tmp_path)
    world.make_pool()
    return world


@pytest.fixture
def operator(world: World) -> Iterator[OperatorProcess]:
    """The operator at work."""
    with world.operator() as process:
        process.wait_ready()
        yield process
