"""The life of a release with the real Helm: install, upgrade with newer CRDs, rollback, uninstall, again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from tests.chart.conftest import remove_crds
from tests.chart.rendered import CHART, only, template
from tests.controlplane.bed import CommandError, ControlPlane, Permission, permissions, wait_until

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(180)]

DEPLOYMENT = {
    "apiVersion": "modelfleet.io/v1alpha1",
    "kind": "ModelDeployment",
    "metadata": {"name": "m", "namespace": "default"},
    "spec": {
        "model": {"source": "hf://o/n"},
        "engine": {"type": "Simulator"},
        "variants": [{"name": "a", "accelerators": [{"type": "CPU"}]}],
    },
}


@pytest.fixture
def empty(control_plane: ControlPlane, system: str) -> Iterator[ControlPlane]:
    """A cluster without anything of ours, before and after."""
    remove_crds(control_plane)
    yield control_plane
    releases = control_plane.helm("list", "-n", system, "-q", "--all").split()
    for release in releases:
        control_plane.helm("uninstall", release, "-n", system, "--wait", "--no-hooks")
    remove_crds(control_plane)


@pytest.fixture
def older_chart(tmp_path: Path) -> Path:
    """The chart as a release before this one could have been: a CRD lacks a field and a column."""
    chart = tmp_path / "modelfleet"
    shutil.copytree(CHART, chart)
    file = chart / "crds" / "servingpools.modelfleet.io.yaml"
    crd = yaml.safe_load(file.read_text())
    version = crd["spec"]["versions"][0]
    version["additionalPrinterColumns"] = version["additionalPrinterColumns"][:1]
    group = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["accelerators"]["items"]
    del group["properties"]["spot"]
    file.write_text(yaml.safe_dump(crd))
    return chart


def columns(cluster: ControlPlane) -> set[str]:
    crd = cluster.get("crd", "servingpools.modelfleet.io")
    return {c["name"] for c in crd["spec"]["versions"][0]["additionalPrinterColumns"]}


def run(command: list[str], kubeconfig: Path) -> str:
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Kubelet:
    """Runs the CRD job's command as its pod would, with its ServiceAccount, while kwok holds still."""

    def __init__(self, cluster: ControlPlane, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.output = ""
        self.account = f"system:serviceaccount:{namespace}:modelfleet-crds"
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kubelet")

    def __enter__(self) -> Self:
        self.cluster.components["kwok"].pause()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=60)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again where the test sees it
            self._error = error
        finally:
            self.cluster.components["kwok"].resume()

    def _work(self) -> None:
        found: list[dict[str, Any]] = []

        def job() -> bool:
            found[:] = self.cluster.list("jobs", self.namespace)
            return bool(found)

        wait_until(job, timeout=30, what="the job", interval=0.1)
        pod = found[0]["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == "modelfleet-crds"
        kubeconfig = self.cluster.service_account_kubeconfig(self.namespace, pod["serviceAccountName"])
        command = [sys.executable, "-m", "modelfleet_operator.cli", *pod["containers"][0]["args"]]
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output


def test_the_life_of_a_release(empty: ControlPlane, system: str, older_chart: Path) -> None:
    scope = ("-n", system)
    notes = empty.helm("install", "modelfleet", str(older_chart), *scope, "--wait", "--timeout=90s")
    assert ("this cluster has no KubeRay" in notes) == (empty.find("crd", "rayclusters.ray.io") is None)
    assert f"kubectl -n {system} port-forward service/modelfleet-router" in notes
    advice = textwrap.dedent(notes.partition("<<EOF\n")[2].partition("  EOF")[0])
    assert "created" in empty.kubectl(
        "create", "--dry-run=server", "--validate=strict", "-f", "-", input=advice
    )
    # CRDs, the pool of the same release, and pods that the restricted standard lets in.
    assert columns(empty) == {"Ready"}
    pool = empty.get("servingpool", "default", system)
    assert pool["spec"]["ray"] == {"cluster": pool["spec"]["ray"]["cluster"]}
    assert empty.get("deployment", "modelfleet-router", system)["status"]["readyReplicas"] == 2
    assert empty.get("deployment", "modelfleet-operator", system)["status"]["readyReplicas"] == 1
    empty.apply(DEPLOYMENT)
    uid = empty.get("mdep", "m", "default")["metadata"]["uid"]

    since = empty.audit.position()
    spot = ("--set-json", 'pool.accelerators=[{"type": "T4", "gpusPerNode": 4, "maxNodes": 3, "spot": true}]')
    with Kubelet(empty, system) as kubelet:
        empty.helm("upgrade", "modelfleet", str(CHART), *scope, *spot, "--wait", "--timeout=90s")
    # The CRD was there before the pool that uses its new field.
    assert columns(empty) == {"Ready", "Reason", "Free", "Address", "Age"}
    assert empty.get("servingpool", "default", system)["spec"]["accelerators"][0]["spot"] is True
    assert empty.get("mdep", "m", "default")["metadata"]["uid"] == uid
    assert empty.audit.denied(kubelet.account, since) == []
    crd = "customresourcedefinitions"
    group = "apiextensions.k8s.io"
    assert empty.audit.used(kubelet.account, since) == {
        Permission(group, crd, "get"),
        Permission(group, crd, "patch"),
    }
    assert not empty.list("jobs", system), "the hook leaves its job behind"
    assert empty.find("clusterrole", f"modelfleet-crds.{system}") is None

    empty.helm("rollback", "modelfleet", "1", *scope, "--wait", "--timeout=90s")
    assert empty.get("servingpool", "default", system)["spec"]["accelerators"][0]["type"] == "CPU"
    assert "Free" in columns(empty), "CRDs never go back: what is stored may need what is newer"
    assert empty.get("mdep", "m", "default")["metadata"]["uid"] == uid

    said = empty.helm("uninstall", "modelfleet", *scope, "--wait")
    assert "[ServingPool] default" in said
    assert empty.find("deployment", "modelfleet-router", system) is None
    assert empty.get("mdep", "m", "default")["metadata"]["uid"] == uid
    pool_uid = empty.get("servingpool", "default", system)["metadata"]["uid"]

    empty.helm("install", "modelfleet", str(CHART), *scope, "--wait", "--timeout=90s")
    assert empty.get("servingpool", "default", system)["metadata"]["uid"] == pool_uid


def test_two_releases_share_a_cluster(empty: ControlPlane, system: str, namespace: str) -> None:
    """Each with the namespaces of a team; what is cluster-wide has names of its own."""
    first = ("--set", f"operator.watchNamespaces={{{system}}}")
    second = ("--set", f"operator.watchNamespaces={{{namespace}}}")
    empty.helm("install", "modelfleet", str(CHART), "-n", system, *first)
    empty.helm("install", "modelfleet", str(CHART), "-n", namespace, *second)
    assert empty.get("servingpool", "default", namespace)["metadata"]["uid"]
    empty.helm("uninstall", "modelfleet", "-n", namespace, "--wait")
    policy = empty.get("validatingadmissionpolicy", f"modelfleet-pool-in-use.{system}")
    assert policy["spec"]["validations"]


def test_the_crd_job_may_do_nothing_else() -> None:
    roles = [o for o in template() if o["kind"] == "ClusterRole" and "-crds." in o["metadata"]["name"]]
    assert len(roles) == 1
    assert {p.verb for p in permissions(roles[0]["rules"])} == {"get", "create", "patch"}
    assert roles[0]["rules"][0]["resourceNames"] == [
        "modeldeployments.modelfleet.io",
        "servingpools.modelfleet.io",
    ]
    job = only(template(), "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"


def test_missing_crds_are_made_by_the_same_command(empty: ControlPlane, system: str) -> None:
    """`helm install --skip-crds` and GitOps tools leave them to others."""
    objects = [
        o for o in template() if o["metadata"]["name"].startswith("modelfleet-crds") and o["kind"] != "Job"
    ]
    empty.apply(*objects)
    kubeconfig = empty.service_account_kubeconfig(system, "modelfleet-crds")
    said = run([sys.executable, "-m", "modelfleet_operator.cli", "crds", "--apply"], kubeconfig)
    assert "servingpools.modelfleet.io applied" in said
    empty.apply(DEPLOYMENT)
    empty.kubectl("delete", "-f", "-", input=yaml.safe_dump_all(objects))


def test_crds_as_printed_are_those_of_the_manifests() -> None:
    command = [sys.executable, "-m", "modelfleet_operator.cli", "crds"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    files = sorted((CHART / "crds").glob("*.yaml"))
    assert list(yaml.safe_load_all(printed)) == [yaml.safe_load(f.read_text()) for f in files]


@pytest.fixture
def installed(empty: ControlPlane, system: str) -> ControlPlane:
    empty.helm("install", "modelfleet", str(CHART), "-n", system)
    return empty


def test_a_pool_in_use_is_not_deleted(installed: ControlPlane, system: str) -> None:
    def use(*users: str) -> None:
        status = yaml.safe_dump({"status": {"usedBy": list(users)}})
        patch = ("--subresource=status", "--type=merge", "-p", status)
        installed.kubectl("patch", "servingpool", "default", "-n", system, *patch)

    def delete() -> str:
        return installed.kubectl("delete", "servingpool", "default", "-n", system, "--dry-run=server")

    use("team-a/m", "team-b/n")
    refused: list[str] = []

    def is_refused() -> bool:  # a policy that is new takes effect a moment later
        try:
            delete()
        except CommandError as error:
            refused.append(error.stderr)
        return bool(refused)

    wait_until(is_refused, timeout=20, what="the deletion refused")
    assert "team-a/m, team-b/n" in refused[0]
    use()
    assert "deleted" in delete()
    use("team-a/m")
    installed.kubectl("annotate", "servingpool", "default", "-n", system, "modelfleet.io/allow-delete=true")
    assert "deleted" in delete()


def test_a_namespace_that_goes_takes_its_pool_along(installed: ControlPlane, system: str) -> None:
    name = installed.create_namespace("team")
    pool = installed.get("servingpool", "default", system)
    body = {k: pool[k] for k in ("apiVersion", "kind", "spec")} | {"metadata": {"name": "own"}}
    installed.apply(body, namespace=name)
    users = '{"status": {"usedBy": ["elsewhere/m"]}}'
    installed.kubectl(
        "patch", "servingpool", "own", "-n", name, "--subresource=status", "--type=merge", "-p", users
    )

    def refused() -> bool:
        try:
            installed.kubectl("delete", "servingpool", "own", "-n", name, "--dry-run=server")
        except CommandError:
            return True
        return False

    wait_until(refused, timeout=20, what="the policy in force")
    installed.delete_namespace(name, timeout=30)


def test_roles_of_the_cluster_know_the_resources(installed: ControlPlane) -> None:
    def verbs(role: str, resource: str) -> set[str]:
        found: set[str] = set()
        for rule in installed.get("clusterrole", role).get("rules") or []:
            if "modelfleet.io" in rule.get("apiGroups", []) and resource in rule["resources"]:
                found |= set(rule["verbs"])
        return found

    read, write = {"get", "list", "watch"}, {"create", "update", "patch", "delete", "deletecollection"}
    wait_until(lambda: verbs("view", "modeldeployments") == read, timeout=20, what="view aggregated")
    wait_until(lambda: verbs("edit", "modeldeployments") == read | write, timeout=20, what="edit aggregated")
    wait_until(lambda: verbs("admin", "servingpools") == read | write, timeout=20, what="admin aggregated")
    assert verbs("edit", "servingpools") == read, "a pool takes machines"
