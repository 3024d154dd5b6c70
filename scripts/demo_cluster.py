"""`make demo-cluster`: the demo through kubectl, against a real Kubernetes control plane on this machine.

What is real: API server, etcd, the operator as it runs in a cluster, Ray, the registry, the router, vLLM and
a small model in two quantizations. What is missing is only the pods around them. With ``DEMO_ONCE=1`` it
asks, deletes, and exits 0, or 1 when something is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from demo_steps import (
    FILE,
    MODEL,
    READY_SECONDS,
    ROOT,
    DemoError,
    ask_all,
    exit_code,
    install_engine,
    listen_address,
    no_more_interrupts,
    once,
    step,
    write_file,
)

sys.path.insert(0, str(ROOT))

from tests.controlplane.bed import (
    BuildError,
    CommandError,
    ComponentError,
    ControlPlane,
    ensure,
)
from tests.controlplane.bed.build import kubectl_path
from tests.controlplane.operator.platform import ClusterPlatform

from modelfleet_operator.clients.local_ray import LocalRayError
from modelfleet_operator.clients.processes import die_with_parent, free_port

NAMESPACE = "demo"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
HINT = """Edit it while the demo runs and `kubectl apply` it again: a changed weight
# moves traffic, a changed engine field rolls a new revision out, a removed variant drains."""


def demo() -> bool:
    """Everything; whether all were answered."""
    listen = listen_address(f"127.0.0.1:{free_port()}")
    step("a Kubernetes control plane: etcd, kube-apiserver, controllers, scheduler")
    try:
        ensure(PROGRAMS)
    except BuildError as error:
        raise DemoError(str(error)) from error
    print("built")
    install_engine()
    write_file("demo-cluster", HINT)
    with ExitStack() as stack:
        try:
            step("starting: the control plane, CRDs, Ray, the registry, the router, the operator")
            plane = stack.enter_context(ControlPlane())
            directory = plane.work / "demo"  # goes with it, also when this script is killed
            directory.mkdir()
            plane.kubectl("create", "namespace", NAMESPACE)
            platform = ClusterPlatform(plane, directory, namespace=NAMESPACE, listen=listen, say=print)
            stack.enter_context(platform)
        except (ComponentError, LocalRayError, CommandError, TimeoutError, AssertionError) as error:
            raise DemoError(str(error)) from error
        stack.callback(no_more_interrupts)
        return show(Terminal(plane.kubeconfig(), directory), platform)


class Terminal:
    """kubectl as somebody types it, with `demo` as the namespace of the context."""

    def __init__(self, admin: Path, directory: Path) -> None:
        self.kubeconfig = directory / "kubeconfig"
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_bytes(admin.read_bytes())
        self._program = str(kubectl_path())
        # A cache of discovery answers in the user's home would outlive the cluster.
        self._environment = os.environ | {
            "KUBECONFIG": str(self.kubeconfig),
            "KUBECACHEDIR": str(directory / "kubectl"),
        }
        command = [self._program, "config", "set-context", "--current", f"--namespace={NAMESPACE}"]
        subprocess.run(command, check=True, env=self._environment, stdout=subprocess.DEVNULL)

    def kubectl(self, *arguments: str) -> None:
        """Run it and let its output be seen.

        Raises:
            DemoError: it failed.
        """
        process = self.start(*arguments)
        try:
            code = process.wait()
        finally:
            process.kill()
        if code != 0:
            raise DemoError(f"kubectl {arguments[0]} failed")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The same in the background."""
        print(f"\n$ kubectl {' '.join(arguments)}", flush=True)
        return subprocess.Popen(
            [self._program, *arguments],
            env=self._environment,
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=die_with_parent,  # noqa: PLW1509  it only calls the kernel
        )


def show(terminal: Terminal, platform: ClusterPlatform) -> bool:
    """The life of a ModelDeployment."""
    try:
        terminal.kubectl("wait", "servingpool/default", "--for=condition=Ready", "--timeout=120s")
    except DemoError as error:
        print(platform.cluster.kubectl("describe", "servingpool", "default", "-n", NAMESPACE))
        raise DemoError(f"{error}; the operator said:\n{platform.operator.text()[-3000:]}") from None
    terminal.kubectl("apply", "-f", str(FILE.relative_to(ROOT)))
    watch = terminal.start("get", "mdep", "-w")
    try:
        wait_until_ready(platform)
        time.sleep(0.5)  # for the watch to show it
    finally:
        watch.kill()
        watch.wait()
    step("asking both variants through the router")
    good = ask_all(platform.url)
    terminal.kubectl("get", "modelfleet")
    if not once():
        until_interrupted(terminal, platform)
    terminal.kubectl("delete", "mdep", MODEL, "--timeout=60s")
    return good


def wait_until_ready(platform: ClusterPlatform) -> None:
    """Wait until everything that was asked for is in place.

    Raises:
        DemoError: the operator ended, or it isn't in time.
    """
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if platform.operator.ended():
            raise DemoError(f"the operator ended:\n{platform.operator.text()[-3000:]}")
        status = (platform.cluster.find("mdep", MODEL, NAMESPACE) or {}).get("status", {})
        found = {c["type"]: c for c in status.get("conditions", ())}
        if found.get("Ready", {}).get("status") == "True":
            return
        time.sleep(0.5)
    print(platform.cluster.kubectl("describe", "mdep", MODEL, "-n", NAMESPACE))
    raise DemoError(f"not ready within {READY_SECONDS:.0f} s; its status above says why")


def how_to_go_on(terminal: Terminal, platform: ClusterPlatform) -> None:
    step("it runs until Ctrl-C. In another terminal:")
    path = "" if shutil.which("kubectl") else f"  export PATH={kubectl_path().parent}:$PATH\n"
    print(
        f"""
{path}  export KUBECONFIG={terminal.kubeconfig}
  kubectl get mdep -w
  kubectl edit mdep {MODEL}
  curl {platform.url}/v1/chat/completions -H 'content-type: application/json' -d \\
    '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 32}}'
""",
        flush=True,
    )


def until_interrupted(terminal: Terminal, platform: ClusterPlatform) -> None:
    """Say what can be done now, and wait for Ctrl-C.

    Raises:
        DemoError: the operator ended by itself.
    """
    try:
        how_to_go_on(terminal, platform)
        while not platform.operator.ended():
            time.sleep(1)
    except KeyboardInterrupt:
        return
    raise DemoError(f"the operator ended:\n{platform.operator.text()[-3000:]}")


if __name__ == "__main__":
    sys.exit(exit_code(demo))
