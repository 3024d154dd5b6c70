"""A Kubernetes control plane on this machine: etcd, API server, controllers, scheduler, simulated nodes."""

from __future__ import annotations

import json
import secrets
import shutil
import ssl
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml
from tests.controlplane.bed import audit, components, kubeconfig, pki
from tests.controlplane.bed.build import Report, ensure, module_dir, to_stderr
from tests.controlplane.bed.cluster import Cluster
from tests.controlplane.bed.nodes import DEFAULT_FLEET, NodeGroup
from tests.controlplane.bed.pods import StandIn
from tests.controlplane.bed.process import Component, ComponentError, Guard, Ports, http_ok, wait_until

_PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
# Of kwok's own collection: nodes with leases, pods that are Ready at once, volumes that bind at once.
_STAGES = ("node/fast", "node/heartbeat-with-lease", "pod/fast", "volume/fast")


class ControlPlane(Cluster):
    """A control plane of one's own, to break at will.

    Use it as a context manager. Nothing of it survives the process, not even when that is killed.

    Args:
        fleet: the nodes it starts with.
        report: where progress of a build goes.

    Raises:
        BuildError: a program can't be built.
        ComponentError: a component does not come up; the message has the end of its log.
    """

    def __init__(self, *, fleet: Sequence[NodeGroup] = DEFAULT_FLEET, report: Report = to_stderr) -> None:
        self._programs = ensure(_PROGRAMS, report=report)
        self._guard = Guard()
        work = Path(tempfile.mkdtemp(prefix="modelfleet-bed-"))
        self._guard.remove(work)
        self.ports = Ports()
        self.layout = components.Layout(work, *(self.ports.take() for _ in range(6)))
        for directory in (self.layout.pki, self.layout.logs):
            directory.mkdir()
        self._authority = pki.Authority("modelfleet-bed")
        self._kubeconfigs: dict[tuple[str, tuple[str, ...]], Path] = {}
        self._fleet = tuple(fleet)
        self._write_files()
        super().__init__(self.kubeconfig(), work)
        self.audit = audit.AuditLog(self.layout.audit_log)
        self.components = {component.name: component for component in self._make_components()}
        self.startup_seconds: dict[str, float] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The API server's address."""
        return self.layout.apiserver_url

    @property
    def ca_file(self) -> Path:
        """The certificate that signs the API server's."""
        return self.layout.pki / "ca.crt"

    @property
    def work(self) -> Path:
        """Its directory; removed at the end."""
        return self.layout.work

    @property
    def guard_pid(self) -> int:
        """The process that cleans up if this one is killed."""
        return self._guard.pid

    @property
    def pids(self) -> dict[str, int]:
        """The running components' process ids."""
        return {name: each.pid for name, each in self.components.items() if each.running}

    def close(self) -> None:
        """End everything at once and remove its files."""
        for component in reversed(self.components.values()):
            component.kill()
        self._guard.close()

    def kubeconfig(self, user: str | None = None, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig for any user: the name and the groups are in its certificate.

        Args:
            user: the user's name; None for the administrator.
            groups: the groups it is in.
        """
        if user is None:
            user, groups = "admin", ("system:masters",)
        key = (user, tuple(groups))
        if key not in self._kubeconfigs:
            self._kubeconfigs[key] = kubeconfig.write(
                self.work / f"{len(self._kubeconfigs)}-{secrets.token_hex(4)}.kubeconfig",
                server=self.url,
                ca=self._authority.pair.certificate,
                user=kubeconfig.client_certificate(self._authority.client(user, groups)),
            )
        return self._kubeconfigs[key]

    def serving_certificate(self, *names: str) -> tuple[Path, Path]:
        """Certificate and key files of a server that the cluster's clients trust, such as a webhook."""
        pair = self._authority.serving(names)
        return pair.write(self.layout.pki, f"serving-{secrets.token_hex(4)}")

    def add_nodes(self, *groups: NodeGroup, first: int = 0, wait: bool = True) -> list[str]:
        """Add machines, as a node autoscaler would, and return their names."""
        nodes = [node for group in groups for node in group.nodes(first)]
        if nodes:
            items = {"apiVersion": "v1", "kind": "List", "items": nodes}
            # `create` keeps the status that a kubelet registers itself with.
            self.kubectl("create", "-f", "-", input=json.dumps(items))
        names = [str(node["metadata"]["name"]) for node in nodes]
        if wait:
            self.wait_for_nodes()
        return names

    def remove_nodes(self, *names: str) -> None:
        """Take machines away at once and their pods with them, as a spot reclaim does.

        The pods are deleted here: the pod garbage collector would do so only after most of a minute.
        """
        self.kubectl("delete", "node", *names, "--wait=true")
        for name in names:
            self.kubectl(
                "delete", "pods", "--all-namespaces", f"--field-selector=spec.nodeName={name}", "--force"
            )

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Wait until every node is Ready and may be scheduled to."""

        def ready() -> bool:
            nodes = json.loads(self.kubectl("get", "nodes", "-o", "json"))["items"]
            return all(_is_ready(node["status"]) and not _not_ready_taint(node["spec"]) for node in nodes)

        wait_until(ready, timeout=timeout, what="all nodes Ready", interval=0.1)

    def restart_apiserver(self, *, hard: bool = False) -> float:
        """Restart the API server at its address and return the seconds until it serves again."""
        started = time.monotonic()
        self.components["kube-apiserver"].restart(hard=hard)
        return time.monotonic() - started

    def stop(self, name: str) -> None:
        """Stop one component, such as ``kube-scheduler``; `components` has further ways to hurt it."""
        self.components[name].stop()

    def start(self, name: str) -> None:
        """Start a stopped component and wait until it serves."""
        self.components[name].start()
        self.components[name].wait_ready()

    def run_component(self, component: Component) -> None:
        """Start a further program that lives as long as this control plane."""
        if component.name in self.components:
            raise ComponentError(f"{component.name} is there already")
        self.components[component.name] = component
        component.start()
        component.wait_ready()

    def component(self, name: str, argv: Sequence[str], health_url: str, env: dict[str, str]) -> Component:
        """A further program, logged and guarded as the others; `run_component` starts it."""
        return Component(
            name,
            argv,
            log=self.layout.logs / f"{name}.log",
            guard=self._guard,
            ready=lambda: http_ok(health_url),
            env=env,
        )

    def stand_in(self, *pods: StandIn) -> None:
        """Let processes of this machine answer for pods: ``kubectl port-forward`` reaches them.

        Takes the place of what was given before. The kubelets restart; pods stay as they are.
        """
        documents = [*_stages(), *(pod.document() for pod in pods)]
        self.layout.stages.write_text(yaml.safe_dump_all(documents))
        self.stop("kwok")
        # It would wait for the end of its predecessor's leases before it cares for the nodes again.
        self.kubectl("delete", "leases", "--all", "-n", "kube-node-lease")
        self.start("kwok")

    def logs(self, name: str) -> str:
        """What a component logged so far."""
        return (self.layout.logs / f"{name}.log").read_text(errors="replace")

    def keep_logs(self, directory: Path) -> Path:
        """Copy all logs and the audit log to `directory`, replacing what is there."""
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.layout.logs, directory)
        if self.layout.audit_log.exists():
            shutil.copy(self.layout.audit_log, directory)
        return directory

    def _start(self) -> None:
        started = time.monotonic()

        def lap(what: str) -> None:
            self.startup_seconds[what] = round(time.monotonic() - started, 2)

        self.components["etcd"].start()
        self.components["etcd"].wait_ready()
        lap("etcd")
        self.components["kube-apiserver"].start()
        self.components["kube-apiserver"].wait_ready()
        lap("kube-apiserver")
        later = [self.components[name] for name in _PROGRAMS[2:]]
        for component in later:
            component.start()
        self.add_nodes(*self._fleet, wait=False)
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump(self._storage_class()))
        for component in later:
            component.wait_ready()
            lap(component.name)
        self.wait_for_nodes()
        wait_until(
            lambda: self.find("serviceaccount", "default", "default") is not None,
            timeout=30,
            what="the default ServiceAccount",
        )
        lap("total")

    def _write_files(self) -> None:
        layout, authority = self.layout, self._authority
        authority.pair.write(layout.pki, "ca")
        names = ["127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        authority.serving([*names, "10.96.0.1"]).write(layout.pki, "apiserver")
        authority.serving(["127.0.0.1"]).write(layout.pki, "kubelet")
        private, public = pki.signing_key()
        (layout.pki / "service-accounts.key").touch(mode=0o600)
        (layout.pki / "service-accounts.key").write_bytes(private)
        (layout.pki / "service-accounts.pub").write_bytes(public)
        layout.audit_policy.write_text(yaml.safe_dump(audit.POLICY))
        layout.stages.write_text(yaml.safe_dump_all(_stages()))

    @staticmethod
    def _storage_class() -> dict[str, object]:
        return next(each for each in _kwok_documents() if each["kind"] == "StorageClass")

    def _make_components(self) -> list[Component]:
        layout, programs = self.layout, self._programs
        trusted = ssl.create_default_context(cafile=str(self.ca_file))
        trusted.load_cert_chain(
            *self._authority.client("bed-probe", ("system:masters",)).write(layout.pki, "probe")
        )
        # The controllers' health ports have certificates that they signed themselves, on loopback.
        loopback = ssl.create_default_context()
        loopback.check_hostname = False
        loopback.verify_mode = ssl.CERT_NONE

        def make(name: str, argv: list[str], health: str, context: ssl.SSLContext | None) -> Component:
            return Component(
                name,
                argv,
                log=layout.logs / f"{name}.log",
                guard=self._guard,
                ready=lambda: http_ok(health, context),
            )

        manager, sched, kwok = (
            self.kubeconfig(f"system:{name}", groups)
            for name, groups in (
                ("kube-controller-manager", ()),
                ("kube-scheduler", ()),
                ("kwok", ("system:masters",)),
            )
        )
        return [
            make("etcd", components.etcd(programs["etcd"], layout), f"{layout.etcd_url}/readyz", None),
            make(
                "kube-apiserver",
                components.apiserver(programs["kube-apiserver"], layout),
                f"{layout.apiserver_url}/readyz",
                trusted,
            ),
            make(
                "kube-controller-manager",
                components.controller_manager(programs["kube-controller-manager"], layout, manager),
                f"https://127.0.0.1:{layout.controller_manager_port}/healthz",
                loopback,
            ),
            make(
                "kube-scheduler",
                components.scheduler(programs["kube-scheduler"], layout, sched),
                f"https://127.0.0.1:{layout.scheduler_port}/readyz",
                loopback,
            ),
            make(
                "kwok",
                components.kwok(programs["kwok"], layout, kwok),
                f"http://127.0.0.1:{layout.kwok_port}/healthz",
                None,
            ),
        ]


def _stages() -> list[dict[str, object]]:
    return [document for document in _kwok_documents() if document["kind"] == "Stage"]


def _kwok_documents() -> list[dict[str, object]]:
    stages = module_dir("kubernetes", "sigs.k8s.io/kwok") / "kustomize" / "stage"
    files = [file for name in _STAGES for file in sorted((stages / name).glob("*.yaml"))]
    return [document for file in files for document in yaml.safe_load_all(file.read_text()) if document]


def _is_ready(status: dict[str, list[dict[str, str]]]) -> bool:
    conditions = status.get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _not_ready_taint(spec: dict[str, list[dict[str, str]]]) -> bool:
    return any(each["key"] == "node.kubernetes.io/not-ready" for each in spec.get("taints", []))
