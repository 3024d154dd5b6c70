"""Pods and conditions, as several tests need them."""

from __future__ import annotations

from typing import Any

from tests.controlplane.bed import GPU, Cluster, wait_until


def gpu_pod(name: str, product: str, gpus: int, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": {"nvidia.com/gpu.product": product},
            "containers": [
                {"name": "engine", "image": "engine", "resources": {"limits": {GPU: str(gpus)}}},
            ],
            **spec,
        },
    }


def condition(item: dict[str, Any] | None, kind: str) -> dict[str, str]:
    found = [each for each in (item or {}).get("status", {}).get("conditions", []) if each["type"] == kind]
    return found[0] if found else {}


def wait_ready(cluster: Cluster, kind: str, name: str, namespace: str, timeout: float = 30) -> dict[str, Any]:
    wait_until(
        lambda: condition(cluster.find(kind, name, namespace), "Ready").get("status") == "True",
        timeout=timeout,
        what=f"{kind} {name} Ready",
    )
    return cluster.get(kind, name, namespace)
