"""How each server of the control plane is started: one function a component, its command line in it.

Everything listens on 127.0.0.1. A flag that differs from what a production cluster has says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SERVICE_CIDR = "10.96.0.0/16"
POD_CIDR = "10.244.0.0/16"
ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass(frozen=True)
class Layout:
    """Files and addresses that the components share."""

    work: Path
    etcd_port: int
    etcd_peer_port: int
    apiserver_port: int
    controller_manager_port: int
    scheduler_port: int
    kwok_port: int

    @property
    def pki(self) -> Path:
        return self.work / "pki"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def audit_log(self) -> Path:
        return self.work / "audit.jsonl"

    @property
    def audit_policy(self) -> Path:
        return self.work / "audit-policy.yaml"

    @property
    def stages(self) -> Path:
        return self.work / "kwok.yaml"

    @property
    def etcd_url(self) -> str:
        return f"http://127.0.0.1:{self.etcd_port}"

    @property
    def apiserver_url(self) -> str:
        return f"https://127.0.0.1:{self.apiserver_port}"


def etcd(program: Path, layout: Layout) -> list[str]:
    """The store."""
    peer = f"http://127.0.0.1:{layout.etcd_peer_port}"
    return [
        str(program),
        f"--data-dir={layout.work / 'etcd'}",
        f"--listen-client-urls={layout.etcd_url}",
        f"--advertise-client-urls={layout.etcd_url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",  # the data needn't outlive the machine; survives a kill of the process
        "--log-level=warn",
    ]


def apiserver(program: Path, layout: Layout) -> list[str]:
    """The API server: default admission, RBAC, service account tokens, audit log."""
    pki = layout.pki
    return [
        str(program),
        f"--etcd-servers={layout.etcd_url}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={layout.apiserver_port}",
        f"--cert-dir={pki}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        "--authorization-mode=RBAC",  # no Node authorizer: kwok speaks for all nodes at once
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={pki / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        "--kubelet-preferred-address-types=InternalIP",  # the nodes' names are no host names
        "--endpoint-reconciler-type=none",  # 127.0.0.1 may not be an endpoint of the Service kubernetes
        "--allow-privileged=true",
        "--shutdown-send-retry-after=true",  # ends in seconds; without it open watches hold it for a minute
        "--profiling=false",
        f"--audit-policy-file={layout.audit_policy}",
        f"--audit-log-path={layout.audit_log}",
        "--audit-log-mode=blocking",  # a test that saw the answer finds the event
        "--audit-log-maxsize=4096",  # one file, never rotated away under a reader
    ]


def controller_manager(program: Path, layout: Layout, kubeconfig: Path) -> list[str]:
    """All built-in controllers: garbage collection, namespaces, deployments, node lifecycle, tokens..."""
    pki = layout.pki
    return [
        str(program),
        f"--kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        f"--secure-port={layout.controller_manager_port}",
        f"--cert-dir={pki / 'controller-manager'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--service-account-private-key-file={pki / 'service-accounts.key'}",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
        f"--cluster-cidr={POD_CIDR}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        "--use-service-account-credentials=true",
        "--kube-api-qps=1000",  # unthrottled: it makes some 40 ServiceAccounts when it starts
        "--kube-api-burst=2000",
        "--node-monitor-period=1s",  # a new node loses its not-ready taint at once instead of after 5 s
        "--leader-elect=false",  # there is one; a restart needn't wait for a lease to end
        "--profiling=false",
    ]


def scheduler(program: Path, layout: Layout, kubeconfig: Path) -> list[str]:
    """The default scheduler with its default profile."""
    return [
        str(program),
        f"--kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        f"--secure-port={layout.scheduler_port}",
        f"--cert-dir={layout.pki / 'scheduler'}",
        "--kube-api-qps=1000",
        "--kube-api-burst=2000",
        "--leader-elect=false",
        "--profiling=false",
    ]


def kwok(program: Path, layout: Layout, kubeconfig: Path) -> list[str]:
    """The kubelets of all nodes: leases, pods that become Ready, end and are deleted; port-forwards."""
    return [
        str(program),
        f"--kubeconfig={kubeconfig}",
        f"--config={layout.stages}",
        "--manage-all-nodes=true",
        f"--cidr={POD_CIDR}",
        "--node-ip=127.0.0.1",  # the API server asks kubelets for port-forwards there
        f"--node-port={layout.kwok_port}",
        f"--tls-cert-file={layout.pki / 'kubelet.crt'}",
        f"--tls-private-key-file={layout.pki / 'kubelet.key'}",
        "--node-lease-duration-seconds=40",
        f"--server-address=127.0.0.1:{layout.kwok_port}",
    ]
