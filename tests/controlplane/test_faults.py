"""The proxy that injects trouble does what it says, and nothing else."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.controlplane.bed import CommandError, ControlPlane, Fault, FaultProxy, wait_until
from tests.controlplane.bed.build import kubectl_path

pytestmark = pytest.mark.controlplane


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultProxy]:
    with FaultProxy(control_plane) as running:
        yield running


@pytest.fixture
def through(control_plane: ControlPlane, proxy: FaultProxy, namespace: str) -> Path:
    """A kubeconfig of an account that may edit the namespace, through the proxy."""
    control_plane.kubectl(
        "create",
        "rolebinding",
        "edit",
        "--clusterrole=edit",
        f"--serviceaccount={namespace}:default",
        "-n",
        namespace,
    )
    account = control_plane.service_account_kubeconfig(namespace, "default")

    def allowed() -> bool:
        try:
            return control_plane.kubectl("auth", "can-i", "list", "pods", kubeconfig=account) != ""
        except CommandError:
            return False

    wait_until(allowed, timeout=10, what="the account may edit")
    return proxy.kubeconfig(account)


def test_passes_on_what_it_is_not_told_to_break(
    control_plane: ControlPlane, proxy: FaultProxy, through: Path
) -> None:
    control_plane.kubectl("create", "configmap", "one", "--from-literal=a=b", kubeconfig=through)
    read = control_plane.kubectl("get", "configmap", "one", "-o=jsonpath={.data.a}", kubeconfig=through)
    assert read == "b"
    assert not proxy.injected


def test_a_throttled_client_waits_and_comes_through(
    control_plane: ControlPlane, proxy: FaultProxy, through: Path
) -> None:
    proxy.inject(Fault(429, frozenset({"GET"}), r"/configmaps", times=2, retry_after=1))
    control_plane.kubectl("get", "configmaps", kubeconfig=through)
    assert proxy.injected == {429: 2}


def test_a_conflict_reaches_the_client_but_not_the_server(
    control_plane: ControlPlane, proxy: FaultProxy, through: Path, namespace: str
) -> None:
    proxy.inject(Fault(409, frozenset({"POST"}), r"/configmaps", times=1))
    with pytest.raises(CommandError, match="injected"):
        control_plane.kubectl("create", "configmap", "two", kubeconfig=through)
    assert control_plane.find("configmap", "two", namespace) is None
    control_plane.kubectl("create", "configmap", "two", kubeconfig=through)


def test_faults_end_when_cleared(control_plane: ControlPlane, proxy: FaultProxy, through: Path) -> None:
    proxy.inject(Fault(500))
    with pytest.raises(CommandError):
        control_plane.kubectl("get", "configmaps", kubeconfig=through)
    proxy.clear()
    control_plane.kubectl("get", "configmaps", kubeconfig=through)


class Watcher:
    """``kubectl get --watch`` with its lines as they come."""

    def __init__(self, kubeconfig: Path) -> None:
        self.process = subprocess.Popen(
            [str(kubectl_path()), "get", "configmaps", "--watch-only", "-o=name"],
            env={"KUBECONFIG": str(kubeconfig), "HOME": str(kubeconfig.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self.lines.append(line.strip())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self._reader.join(10)


@pytest.fixture
def watcher(proxy: FaultProxy, through: Path) -> Iterator[Watcher]:
    running = Watcher(through)
    try:
        wait_until(lambda: proxy.watches == 1, timeout=10, what="the watch open")
        yield running
    finally:
        running.close()


def test_a_cut_watch_ends_for_the_client(proxy: FaultProxy, watcher: Watcher) -> None:
    assert proxy.cut_watches() == 1
    watcher.process.wait(10)
    wait_until(lambda: proxy.watches == 0, timeout=10, what="the watch forgotten")


def test_an_api_server_that_dies_is_lost_for_the_client(
    control_plane: ControlPlane, proxy: FaultProxy, watcher: Watcher, through: Path
) -> None:
    control_plane.restart_apiserver(hard=True)
    watcher.process.wait(10)
    assert proxy.watches == 0
    control_plane.kubectl("get", "configmaps", kubeconfig=through)


def test_a_frozen_watch_is_open_and_silent(
    control_plane: ControlPlane, proxy: FaultProxy, watcher: Watcher, namespace: str
) -> None:
    proxy.freeze_watches()
    control_plane.kubectl("create", "configmap", "unseen", "-n", namespace)
    # Another watch, straight to the server, proves that the event is out.
    straight = ["wait", "--for=create", "configmap/unseen", "-n", namespace, "--timeout=10s"]
    control_plane.kubectl(*straight)
    assert "configmap/unseen" not in watcher.lines
    assert watcher.process.poll() is None
    proxy.thaw_watches()
    wait_until(lambda: "configmap/unseen" in watcher.lines, timeout=10, what="the event")


def test_a_certificate_cannot_be_passed_on(control_plane: ControlPlane, proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="no token"):
        proxy.kubeconfig(control_plane.kubeconfig("alice"))
