"""What a test of the operator has at hand: one namespace, one pool, and words for what it looks at."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tests.controlplane.bed import Cluster, wait_until
from tests.controlplane.operator.processes import OperatorProcess, RegistryProcess
from tests.controlplane.operator.standin import RayThread

from modelfleet_serving.contract import TableUpdate

GROUP = "modelfleet.io/v1alpha1"


def deployment(name: str = "m", **spec: Any) -> dict[str, Any]:
    """A ModelDeployment with two simulated variants, unless told otherwise."""
    base: dict[str, Any] = {
        "model": {"source": "hf://o/n"},
        "engine": {"type": "Simulator"},
        "variants": [
            {"name": "a", "accelerators": [{"type": "A10"}]},
            {"name": "b", "accelerators": [{"type": "T4"}]},
        ],
    }
    return {"apiVersion": GROUP, "kind": "ModelDeployment", "metadata": {"name": name}, "spec": base | spec}


def accelerators() -> list[dict[str, Any]]:
    return [
        {"type": "A10", "gpusPerNode": 4, "minNodes": 1, "maxNodes": 4},
        {"type": "T4", "gpusPerNode": 4, "minNodes": 1, "maxNodes": 4},
    ]


@dataclass
class World:
    cluster: Cluster
    namespace: str
    registry: RegistryProcess
    ray: RayThread
    kubeconfig: Path
    directory: Path
    operators: list[OperatorProcess] = field(default_factory=list)

    def make_pool(self, name: str = "default", **spec: Any) -> None:
        secret = {
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ray-token"},
            "stringData": {"token": self.registry.token},
        }  # fmt: skip
        ray = {
            "address": self.ray.url,
            "registry": self.registry.url,
            "authToken": {"name": "ray-token", "key": "token"},
        }
        pool = {
            "apiVersion": GROUP, "kind": "ServingPool", "metadata": {"name": name},
            "spec": {"ray": ray, "accelerators": accelerators()} | spec,
        }  # fmt: skip
        self.cluster.apply(secret, pool, namespace=self.namespace)

    def operator(
        self, kubeconfig: Path | None = None, *, prepared: bool = True, **settings: str
    ) -> OperatorProcess:
        log = self.directory / f"operator-{len(self.operators)}.log"
        settings = {"WATCH_NAMESPACES": self.namespace, "LET_GO_SECONDS": "5"} | settings
        process = OperatorProcess(kubeconfig or self.kubeconfig, log, prepared=prepared, **settings)
        self.operators.append(process)
        return process

    def apply(self, body: dict[str, Any]) -> None:
        self.cluster.apply(body, namespace=self.namespace)

    def get(self, name: str = "m", kind: str = "mdep") -> dict[str, Any]:
        return self.cluster.get(kind, name, self.namespace)

    def condition(self, kind: str, name: str = "m", resource: str = "mdep") -> tuple[str, str, str]:
        """Status, reason and message of a condition; empty before it is there."""
        found = self.cluster.find(resource, name, self.namespace) or {}
        for condition in found.get("status", {}).get("conditions", ()):
            if condition["type"] == kind:
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""

    def wait_condition(
        self, kind: str, status: str = "True", name: str = "m", *, reason: str = "", timeout: float = 15,
        resource: str = "mdep",
    ) -> str:  # fmt: skip
        """Wait for a condition; its message."""

        def holds() -> bool:
            found = self.condition(kind, name, resource)
            return found[0] == status and reason in ("", found[1])

        try:
            wait_until(holds, timeout=timeout, what=f"{kind}={status} {reason} of {name}", interval=0.05)
        except TimeoutError as error:
            logs = "\n".join(o.text()[-3000:] for o in self.operators)
            state = json.dumps(
                (self.cluster.find(resource, name, self.namespace) or {}).get("status"), indent=1
            )
            raise TimeoutError(f"{error}\n{state}\n{logs}") from error
        return self.condition(kind, name, resource)[2]

    def table(self) -> TableUpdate:
        """The route table as a router gets it."""
        request = urllib.request.Request(
            f"{self.registry.url}/v1/table?epoch=&version=-1&timeout=0&router=test",
            headers={"authorization": f"Bearer {self.registry.token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return msgspec.json.decode(answer.read(), type=TableUpdate)
        except urllib.error.HTTPError as error:
            if error.code != 304:  # a registry that has just started publishes nothing yet
                raise
            return TableUpdate(epoch="", version=-1, full=True)

    def route(self, model: str = "m") -> Any:
        return next((m for m in self.table().models if m.name == model), None)

    def events(self) -> list[tuple[str, str]]:
        found = json.loads(self.cluster.kubectl("get", "events", "-n", self.namespace, "-o", "json"))["items"]
        return [(e["involvedObject"]["name"], e["reason"]) for e in found]
