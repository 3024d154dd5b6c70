"""Breaking the test bed: restarts, absences, frozen servers, a killed test run."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import psutil
import pytest
from tests.controlplane.bed import GPU_TOLERATION, CommandError, ControlPlane, wait_until
from tests.controlplane.pods import gpu_pod, wait_ready

pytestmark = pytest.mark.controlplane


@pytest.mark.parametrize("hard", [False, True], ids=["stopped", "killed"])
def test_objects_survive_a_restart_of_the_api_server(
    control_plane: ControlPlane, namespace: str, hard: bool
) -> None:
    control_plane.kubectl("create", "configmap", "kept", "--from-literal=key=value", "-n", namespace)
    seconds = control_plane.restart_apiserver(hard=hard)
    assert seconds < 30
    assert control_plane.get("configmap", "kept", namespace)["data"] == {"key": "value"}
    cluster_pod = gpu_pod("after", "NVIDIA-A10", 1, tolerations=[GPU_TOLERATION])
    control_plane.apply(cluster_pod, namespace=namespace)
    wait_ready(control_plane, "pod", "after", namespace, timeout=60)


def test_a_component_can_be_away(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.stop("kube-scheduler")
    try:
        control_plane.apply(
            gpu_pod("waits", "Tesla-T4", 1, tolerations=[GPU_TOLERATION]), namespace=namespace
        )
        assert "nodeName" not in control_plane.get("pod", "waits", namespace)["spec"]
    finally:
        control_plane.start("kube-scheduler")
    wait_ready(control_plane, "pod", "waits", namespace)


def test_a_frozen_api_server_hangs_and_goes_on(control_plane: ControlPlane) -> None:
    apiserver = control_plane.components["kube-apiserver"]
    apiserver.pause()
    try:
        with pytest.raises(CommandError, match=r"(?i)timeout|deadline|exceeded"):
            control_plane.kubectl("get", "--raw", "/version", "--request-timeout=1s")
    finally:
        apiserver.resume()
    assert "gitVersion" in control_plane.kubectl("get", "--raw", "/version")


PLAIN_SESSION = textwrap.dedent(
    """
    import json, sys, time
    from tests.controlplane.bed import ControlPlane, NodeGroup
    bed = ControlPlane(fleet=[NodeGroup("cpu", 1)])
    bed.__enter__()
    print(json.dumps({"pids": bed.pids, "guard": bed.guard_pid, "work": str(bed.work)}), flush=True)
    time.sleep(300)
    """
)


def test_nothing_is_left_when_the_test_run_is_killed() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", PLAIN_SESSION], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        with run.stdout:
            started = json.loads(run.stdout.readline())
            os.kill(run.pid, signal.SIGKILL)
            run.wait(10)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait(10)
    assert len(started["pids"]) == 5
    everything = [*started["pids"].values(), started["guard"]]
    wait_until(
        lambda: not any(_alive(pid) for pid in everything) and not Path(started["work"]).exists(),
        timeout=20,
        what="all processes and files gone",
    )


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_plain_http_client_can_speak_to_it(control_plane: ControlPlane) -> None:
    trusted = ssl.create_default_context(cafile=str(control_plane.ca_file))
    with urllib.request.urlopen(f"{control_plane.url}/version", timeout=5, context=trusted) as answer:
        assert json.load(answer)["major"] == "1"
