"""The README's cluster section, followed word for word on a cluster that has never seen us.

Every command of the section runs as it stands there, in its order, in a shell in the repository's root, and
must print what the README says. What differs from a reader's cluster:

- `helm install kuberay-operator ... --repo` needs the network: the test bed has this KubeRay as a process.
- `docker build` and `docker push` need Docker and a registry; no image is pulled on simulated nodes.
- Nothing runs in the pods. What their containers would run are processes of this machine, with the
  ServiceAccount and the environment that the chart gave the pods: operator, router, and a simulated engine.
  A stand-in answers for Ray's API, and the registry is a process. `kubectl port-forward` reaches the router.
- Port 8000 may be somebody else's here: the commands get a free one in its place.
- A reader types more slowly than a script: what `kubectl get` shows may take two seconds to be so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.chart.conftest import remove_crds
from tests.chart.readme import Command, commands, matches, reasons
from tests.chart.rendered import ROOT, SYSTEM
from tests.controlplane.bed import ControlPlane, StandIn, ensure, wait_until
from tests.controlplane.bed.build import kubectl_path
from tests.controlplane.bed.process import http_ok
from tests.controlplane.operator.processes import OperatorProcess, Process, RegistryProcess
from tests.controlplane.operator.standin import RayStandIn, RayThread

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(240)]

ELSEWHERE = ("helm install kuberay-operator kuberay-operator --repo ", "docker build ", "docker push ")
"""How the commands begin that can't run here; see above."""
ROUTER_PORT = 8080
READING_SECONDS = 2.0
REPLICAS = 3
"""Of the sample."""


class Reader:
    """Types the commands and believes only what they print."""

    def __init__(self, cluster: ControlPlane, directory: Path, port: int) -> None:
        self.port = port
        self.transcript: list[str] = []
        self.background: list[subprocess.Popen[bytes]] = []
        tools = directory / "bin"
        tools.mkdir()
        (tools / "kubectl").symlink_to(kubectl_path())
        (tools / "helm").symlink_to(ensure(["helm"])["helm"])
        self._environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(directory),
            "KUBECONFIG": str(cluster.kubeconfig()),
        }

    def type(self, command: Command) -> str:
        """Run it; what it printed."""
        text = command.text.replace("8000", str(self.port))
        self.transcript.append(f"$ {text}")
        if text.endswith(" &"):
            self.background.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {text.removesuffix(' &')}"],
                    cwd=ROOT,
                    env=self._environment,
                    stdout=subprocess.DEVNULL,
                )
            )
            wait_until(lambda: http_ok(f"http://127.0.0.1:{self.port}/readyz"), timeout=20, what=text)
            return ""
        deadline = time.monotonic() + (READING_SECONDS if text.startswith("kubectl get ") else 0.0)
        while True:
            done = subprocess.run(
                ["bash", "-c", text], cwd=ROOT, env=self._environment, capture_output=True, text=True,
                timeout=45, check=False,
            )  # fmt: skip
            if matches(command, done.stdout) or time.monotonic() > deadline:
                break
        self.transcript.append((done.stdout + done.stderr).rstrip())
        assert done.returncode == 0, self.story()
        assert matches(command, done.stdout), f"the README says:\n{command.expected}\n{self.story()}"
        return done.stdout

    def story(self) -> str:
        """Everything so far."""
        return "\n".join(self.transcript)

    def leave(self) -> None:
        """End what runs in the background."""
        for process in self.background:
            process.kill()
            process.wait()


class Containers:
    """What the containers of the release would run."""

    def __init__(self, cluster: ControlPlane, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.stack = ExitStack()

    def environment(self, deployment: str) -> dict[str, str]:
        pod = self.cluster.get("deployment", deployment, SYSTEM)["spec"]["template"]["spec"]
        return {v["name"]: v["value"] for v in pod["containers"][0]["env"] if "value" in v}

    def state(self) -> str:
        """For a failure: what the resources and the processes say."""
        resources = self.cluster.kubectl("get", "mdep,servingpools", "-A", "-o", "yaml")
        return "\n".join([resources, *(f.read_text()[-3000:] for f in sorted(self.directory.glob("*.log")))])

    def start(self) -> None:
        """What a kubelet would do once the pods are placed."""
        cluster, ports, enter = self.cluster, self.cluster.ports, self.stack.enter_context
        dashboard, registry_port, router, *engines = (ports.take() for _ in range(3 + REPLICAS))
        account = cluster.service_account_kubeconfig(SYSTEM, "modelfleet-operator")
        settings = {
            name.removeprefix("MODELFLEET_"): value
            for name, value in self.environment("modelfleet-operator").items()
            if name.startswith("MODELFLEET_") and name != "MODELFLEET_LISTEN"
        }
        head = f"default-head-svc.{SYSTEM}.svc"
        services = {f"{head}:8265": dashboard, f"{head}:8267": registry_port}
        log = self.directory / "operator.log"
        self.operator = OperatorProcess(account, log, SYSTEM, services, **settings)
        enter(self.operator).wait_ready()
        wait_until(
            lambda: cluster.find("secret", "default-ray-token", SYSTEM) is not None,
            timeout=30,
            what="the token that the Ray head and the routers mount",
        )
        token = b64decode(cluster.get("secret", "default-ray-token", SYSTEM)["data"]["auth_token"]).decode()
        registry = enter(RegistryProcess(self.directory, token, registry_port))
        registry.wait_ready()
        for port in engines:
            command = [sys.executable, "-m", "modelfleet_serving.simulator", "--model", "simulated"]
            log = self.directory / f"engine-{port}.log"
            enter(Process("engine", [*command, "--port", str(port)], log, {}))
        urls = [f"http://127.0.0.1:{port}" for port in engines]
        for url in urls:
            wait_until(lambda url=url: http_ok(f"{url}/health"), timeout=20, what="an engine")  # type: ignore[misc]
        enter(RayThread(RayStandIn(registry.url, token, urls, port=dashboard)))
        self._start_router(router, registry, token)

    def _start_router(self, port: int, registry: RegistryProcess, token: str) -> None:
        given = self.environment("modelfleet-router")
        assert given["MODELFLEET_ROUTER_REGISTRY"] == f"http://default-head-svc.{SYSTEM}.svc:8267"
        assert given["MODELFLEET_ROUTER_LISTEN"] == f"0.0.0.0:{ROUTER_PORT}"
        (self.directory / "token").write_text(token)
        here = {
            "MODELFLEET_ROUTER_REGISTRY": registry.url,
            "MODELFLEET_ROUTER_LISTEN": f"127.0.0.1:{port}",
            "MODELFLEET_ROUTER_TOKEN_FILE": str(self.directory / "token"),
        }
        command = [sys.executable, "-m", "modelfleet_operator.cli", "router"]
        self.stack.enter_context(Process("router", command, self.directory / "router.log", given | here))
        # Also before there is a model: `helm install --wait` and a rollout wait for it.
        wait_until(lambda: http_ok(f"http://127.0.0.1:{port}/readyz"), timeout=30, what="the router ready")
        pods = self.cluster.list("pods", SYSTEM, "app.kubernetes.io/component=router")
        assert pods
        self.cluster.stand_in(*(StandIn(SYSTEM, p["metadata"]["name"], {ROUTER_PORT: port}) for p in pods))


@pytest.fixture
def cluster(kuberay_operator: ControlPlane) -> Iterator[ControlPlane]:
    """A cluster with KubeRay and nothing of ours, before and after."""
    remove_crds(kuberay_operator)
    kuberay_operator.delete_namespace(SYSTEM, timeout=60)
    yield kuberay_operator
    for release in kuberay_operator.helm("list", "-n", SYSTEM, "-q", "--all").split():
        kuberay_operator.helm("uninstall", release, "-n", SYSTEM, "--wait", "--no-hooks")
    remove_crds(kuberay_operator)


def test_the_cluster_section_can_be_followed_word_for_word(cluster: ControlPlane, tmp_path: Path) -> None:
    reader = Reader(cluster, tmp_path, cluster.ports.take())
    containers = Containers(cluster, tmp_path)
    typed = [command for command in commands() if not command.text.startswith(ELSEWHERE)]
    assert len(typed) == 14, "the README has another number of commands: does the test still see them all?"
    with containers.stack:
        try:
            for command in typed:
                printed = reader.type(command)
                if command.text.startswith("helm install modelfleet"):
                    assert "KubeRay" not in printed, printed
                    containers.start()
                if command.text.startswith("curl"):
                    answer = json.loads(printed)
                    assert answer["choices"][0]["message"]["content"].strip(), reader.story()
                if command.text.startswith("helm uninstall"):
                    assert containers.operator.stop() < 5
        except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{error}\n{reader.story()}\n{containers.state()}") from error
        finally:
            reader.leave()
    print(reader.story())
    assert "Traceback" not in containers.operator.text()
    # Nothing of ours is left, but the namespace that the reader made.
    kinds = "deployments,services,configmaps,secrets,pods,roles,rolebindings,leases,networkpolicies"

    def left() -> list[str]:
        names = cluster.kubectl("get", kinds, "-n", SYSTEM, "-o", "name").split()
        return [o for o in names if "kube-root-ca" not in o and not o.startswith("lease")]

    # The garbage collector goes after the Ray cluster's owner.
    wait_until(lambda: not left(), timeout=30, what=f"nothing left of {left()}")
    admission = "validatingadmissionpolicies,validatingadmissionpolicybindings"
    wide = cluster.kubectl("get", f"crds,clusterroles,clusterrolebindings,{admission}", "-o", "name")
    assert "modelfleet" not in wide


def test_the_first_error_in_the_table_is_what_kubectl_says(cluster: ControlPlane) -> None:
    sample = str(ROOT / "manifests" / "samples" / "simulator.yaml")
    with pytest.raises(Exception, match='no matches for kind "ModelDeployment"'):
        cluster.kubectl("apply", "-f", sample)


def test_the_reasons_in_the_table_are_the_operators() -> None:
    sources = [file.read_text() for file in (ROOT / "operator").rglob("*.py")]
    assert len(reasons()) >= 3
    for reason in reasons():
        assert any(f'"{reason}"' in source for source in sources), reason
