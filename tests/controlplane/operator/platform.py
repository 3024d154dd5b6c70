"""The whole platform beside a control plane: Ray, registry, router and operator as processes of this machine.

For `make demo-cluster` and the end-to-end test. What is missing are only the pods around the processes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.controlplane.bed import Cluster, wait_until
from tests.controlplane.bed.process import http_ok
from tests.controlplane.operator.processes import OperatorProcess, Process, RegistryProcess

from modelfleet_operator.clients.local_ray import LocalRay
from modelfleet_operator.clients.processes import free_port

MANIFESTS = Path(__file__).parents[3] / "manifests"
_API = "modelfleet.io/v1alpha1"
_SECRET = "ray-token"


class ClusterPlatform:
    """Everything that a ModelDeployment of one namespace needs; a context manager.

    Args:
        cluster: the control plane. It gets the CRDs and the admission policy.
        directory: for logs and tokens.
        namespace: the namespace to work in; it is there.
        listen: ``HOST:PORT`` of the router; by default a free port.
        cpus: CPUs that Ray may hand out; by default this machine's.
        say: gets a line for people now and then.

    Raises:
        AssertionError, TimeoutError, LocalRayError: a part does not come up; the message says which and why.
    """

    def __init__(
        self,
        cluster: Cluster,
        directory: Path,
        *,
        namespace: str,
        listen: str = "",
        cpus: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.directory = directory
        self.listen = listen or f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.listen}"
        self._cpus = cpus or os.cpu_count() or 1
        self.ray = LocalRay(directory, on_progress=say, cpus=self._cpus)
        self.operator = OperatorProcess(
            cluster.kubeconfig(), directory / "operator.log", WATCH_NAMESPACES=namespace
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def log(self) -> str:
        """The end of what each process logged."""
        texts = [
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}"
            for file in sorted(self.directory.rglob("*.log"))
        ]
        return "\n".join(texts)

    def _start(self) -> None:
        enter = self._stack.enter_context
        runner = enter(asyncio.Runner())
        self._stack.callback(lambda: runner.run(self.ray.stop()))
        runner.run(self.ray.start())
        registry = enter(RegistryProcess(self.directory, self.ray.token()))
        registry.wait_ready()
        command = [sys.executable, "-m", "modelfleet_serving.router", "--listen", self.listen]
        command += ["--registry", registry.url, "--token-file", str(self.ray.token_file)]
        router = enter(Process("router", command, self.directory / "router.log", {}))

        def listening() -> bool:
            assert not router.ended(), f"the router ended:\n{router.text()[-2000:]}"
            return http_ok(f"{self.url}/healthz")

        wait_until(listening, timeout=20, what=f"the router at {self.listen}")
        for folder in ("crds", "admission"):
            self.cluster.kubectl("apply", "--server-side", "-f", str(MANIFESTS / folder))
        self.cluster.wait_for_crd("modeldeployments.modelfleet.io", "servingpools.modelfleet.io")
        enter(self.operator)
        self.operator.wait_ready()
        self.cluster.apply(*self._pool(registry), namespace=self.namespace)

    def _pool(self, registry: RegistryProcess) -> list[dict[str, Any]]:
        node = {"type": "CPU", "gpusPerNode": 0, "cpusPerNode": str(self._cpus), "memoryPerNode": "8Gi"}
        ray = {
            "address": self.ray.dashboard_url,
            "registry": registry.url,
            "authToken": {"name": _SECRET, "key": "token"},
        }
        secret = {"apiVersion": "v1", "kind": "Secret", "stringData": {"token": self.ray.token()}}
        spec = {"ray": ray, "accelerators": [node | {"minNodes": 1, "maxNodes": 1}]}
        return [
            secret | {"metadata": {"name": _SECRET}},
            {"apiVersion": _API, "kind": "ServingPool", "metadata": {"name": "default"}, "spec": spec},
        ]
