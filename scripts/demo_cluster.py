"""`make demo-cluster`: the demo through kubectl, against a real Kubernetes control plane on this machine.

What is real: API server, etcd, the operator as it runs in a cluster, Ray, the registry, the router, vLLM and
a small model in two quantizations. What is missing is only the pods around them. With ``DEMO_ONCE=1`` it
asks, deletes, and exits 0, or 1 when something is missing.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import openai

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from demo import BUILD, FILE, MODEL, TEMPLATE, VARIANTS, ask, make_model, run, step, stream  # noqa: E402
from tests.controlplane.bed import CommandError, ControlPlane  # noqa: E402
from tests.controlplane.operator.processes import OperatorProcess, Process, RegistryProcess  # noqa: E402

from modelfleet_operator.clients.local_ray import LocalRay  # noqa: E402
from modelfleet_operator.clients.processes import free_port  # noqa: E402

NAMESPACE = "demo"
READY_SECONDS = 600.0
POOL = """\
apiVersion: v1
kind: Secret
metadata: {{name: ray-token}}
stringData: {{token: "{token}"}}
---
apiVersion: modelfleet.io/v1alpha1
kind: ServingPool
metadata: {{name: default}}
spec:
  ray:
    address: {ray}
    registry: {registry}
    authToken: {{name: ray-token, key: token}}
  accelerators:
  - {{type: CPU, gpusPerNode: 0, cpusPerNode: "{cpus}", memoryPerNode: 8Gi, minNodes: 1, maxNodes: 1}}
"""


async def demo(plane: ControlPlane, directory: Path) -> int:
    """Everything, on a control plane that is up."""
    once = os.environ.get("DEMO_ONCE") == "1"
    async with AsyncExitStack() as stack:
        step("CRDs and the admission policy")
        for folder in ("crds", "admission"):
            print(plane.kubectl("apply", "--server-side", "-f", str(ROOT / "manifests" / folder)).rstrip())
        plane.wait_for_crd("modeldeployments.modelfleet.io", "servingpools.modelfleet.io")
        plane.kubectl("create", "namespace", NAMESPACE)
        step("Ray, the registry, the router and the operator")
        ray = LocalRay(directory, on_progress=print)
        stack.push_async_callback(ray.stop)
        await ray.start()
        registry = stack.enter_context(RegistryProcess(directory, ray.token()))
        registry.wait_ready()
        listen = os.environ.get("DEMO_LISTEN") or f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "modelfleet_serving.router", "--listen", listen]
        command += ["--registry", registry.url, "--token-file", str(ray.token_file)]
        stack.enter_context(Process("router", command, directory / "router.log", {}))
        operator = OperatorProcess(plane.kubeconfig(), directory / "operator.log", WATCH_NAMESPACES=NAMESPACE)
        stack.enter_context(operator)
        operator.wait_ready()
        pool = POOL.format(
            token=ray.token(), ray=ray.dashboard_url, registry=registry.url, cpus=os.cpu_count() or 1
        )
        plane.apply(pool, namespace=NAMESPACE)

        step(f"kubectl apply -f {FILE.relative_to(ROOT)}")
        print(plane.apply(FILE.read_text(), namespace=NAMESPACE).rstrip())
        step("kubectl get mdep -w")
        if not await asyncio.to_thread(follow, plane):
            sys.stdout.write(operator.text()[-3000:])
            return 1
        step("asking both variants through the router")
        client = openai.OpenAI(base_url=f"http://{listen}/v1", api_key="none", timeout=120)
        good = [await asyncio.to_thread(ask, client, f"{MODEL}:{variant}") for variant in VARIANTS]
        good.append(await asyncio.to_thread(stream, client, MODEL))
        print(plane.kubectl("get", "modelfleet", "-n", NAMESPACE))
        if not once:
            step("it runs until Ctrl-C. In another terminal:")
            print(f"\n  export KUBECONFIG={plane.kubeconfig()}\n  kubectl get mdep -n {NAMESPACE} -w\n")
            await asyncio.Event().wait()
        step(f"kubectl delete mdep {MODEL}")
        try:
            print(
                plane.kubectl("delete", "mdep", MODEL, "-n", NAMESPACE, "--timeout=60s", timeout=90).rstrip()
            )
        except CommandError as error:
            print(error)
            return 1
        return 0 if all(good) else 1


def follow(plane: ControlPlane) -> bool:
    """Print each change of the table until the model is ready; whether it got there."""
    deadline, shown = time.monotonic() + READY_SECONDS, ""
    columns = plane.kubectl("get", "mdep", "-n", NAMESPACE).splitlines()[0]
    print(columns)
    while time.monotonic() < deadline:
        line = plane.kubectl("get", "mdep", MODEL, "-n", NAMESPACE, "--no-headers").rstrip()
        without_age = line.rpartition(" ")[0].rstrip()
        if without_age != shown:
            shown = without_age
            print(line, flush=True)
        if " AllVariantsReady" in line:
            return True
        time.sleep(0.5)
    print(plane.kubectl("get", "mdep", MODEL, "-n", NAMESPACE, "-o", "yaml"))
    return False


def main() -> int:
    """Entry point."""
    step("an engine for this machine: vLLM")
    run(sys.executable, "-m", "modelfleet_serving.environments", "install", "vllm")
    step("a real small model in two quantizations: SmolLM2-135M, bf16 and int8 (W8A8)")
    paths = make_model()
    BUILD.mkdir(parents=True, exist_ok=True)
    FILE.write_text(TEMPLATE.format(model=MODEL, bf16=paths["bf16"], int8=paths["w8a8"]))
    step("a Kubernetes control plane: etcd, kube-apiserver, controllers, scheduler")
    with ControlPlane() as plane, tempfile.TemporaryDirectory(prefix="modelfleet-demo-") as directory:
        try:
            return asyncio.run(demo(plane, Path(directory)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return 0
        except subprocess.TimeoutExpired as error:
            print(error)
            return 1


if __name__ == "__main__":
    sys.exit(main())
