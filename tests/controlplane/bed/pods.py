"""Processes of this machine in the place of simulated pods: ``kubectl port-forward`` reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StandIn:
    """What answers in the place of a pod.

    Attributes:
        namespace: the pod's.
        pod: the pod's name.
        ports: for each port of the pod the port on 127.0.0.1 that answers in its place.
    """

    namespace: str
    pod: str
    ports: Mapping[int, int]

    def document(self) -> dict[str, Any]:
        """Configuration for kwok."""
        forwards = [
            {"ports": [port], "target": {"address": "127.0.0.1", "port": local}}
            for port, local in self.ports.items()
        ]
        return {
            "apiVersion": "kwok.x-k8s.io/v1alpha1",
            "kind": "PortForward",
            "metadata": {"namespace": self.namespace, "name": self.pod},
            "spec": {"forwards": forwards},
        }
