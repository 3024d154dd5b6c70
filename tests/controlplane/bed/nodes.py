"""The machines of the test bed: nodes as the GPU operator and the NVIDIA device plugin present them.

Labels are those of NVIDIA's GPU feature discovery (nvidia.com/gpu.product and the others; memory in MiB, as
the driver reports it), the resource is the device plugin's ``nvidia.com/gpu``, and the taint is the one that
cloud providers and the GPU operator's guide put on GPU nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GPU = "nvidia.com/gpu"
GPU_TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}
GPU_TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Gpu:
    """A GPU model as feature discovery labels it."""

    product: str
    memory_mib: int
    family: str
    compute: tuple[int, int]
    mig_capable: bool = False


A100_80G = Gpu("NVIDIA-A100-SXM4-80GB", 81920, "ampere", (8, 0), mig_capable=True)
A100_40G = Gpu("NVIDIA-A100-SXM4-40GB", 40960, "ampere", (8, 0), mig_capable=True)
A10 = Gpu("NVIDIA-A10", 23028, "ampere", (8, 6))
T4 = Gpu("Tesla-T4", 15360, "turing", (7, 5))


@dataclass(frozen=True)
class NodeGroup:
    """Machines of one kind.

    Attributes:
        name: the nodes are called NAME-0, NAME-1, ...
        count: how many.
        gpu: its GPU model; None for a machine without.
        gpus: GPUs of one machine.
        cpu: cores.
        memory: bytes, as a Kubernetes quantity.
        instance_type: the cloud's name of the machine.
        labels: further labels.
        spot: whether the cloud may take it away (label as Karpenter sets it).
    """

    name: str
    count: int
    gpu: Gpu | None = None
    gpus: int = 0
    cpu: str = "16"
    memory: str = "64Gi"
    instance_type: str = "standard"
    labels: Mapping[str, str] = field(default_factory=dict)
    spot: bool = False

    def nodes(self, first: int = 0) -> list[dict[str, Any]]:
        """The Node objects, numbered from `first`."""
        return [self._node(number) for number in range(first, first + self.count)]

    def _node(self, number: int) -> dict[str, Any]:
        name = f"{self.name}-{number}"
        resources = {"cpu": self.cpu, "memory": self.memory, "ephemeral-storage": "500Gi", "pods": "250"}
        labels = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "node.kubernetes.io/instance-type": self.instance_type,
            "topology.kubernetes.io/region": "bed",
            "topology.kubernetes.io/zone": f"bed-{'abc'[number % 3]}",
            "karpenter.sh/capacity-type": "spot" if self.spot else "on-demand",
            "type": "kwok",
        }
        taints = []
        if self.gpu is not None:
            resources[GPU] = str(self.gpus)
            labels |= _gpu_labels(self.gpu, self.gpus)
            taints.append(GPU_TAINT)
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {**labels, **self.labels},
                "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
            },
            "spec": {"taints": taints, "providerID": f"kwok://{name}"},
            "status": {"capacity": resources, "allocatable": resources},
        }


def _gpu_labels(gpu: Gpu, count: int) -> dict[str, str]:
    major, minor = gpu.compute
    return {
        "feature.node.kubernetes.io/pci-10de.present": "true",
        "nvidia.com/cuda.driver-version.full": "580.95.05",
        "nvidia.com/cuda.driver-version.major": "580",
        "nvidia.com/cuda.driver-version.minor": "95",
        "nvidia.com/cuda.driver-version.revision": "05",
        "nvidia.com/cuda.runtime-version.full": "13.0",
        "nvidia.com/cuda.runtime-version.major": "13",
        "nvidia.com/cuda.runtime-version.minor": "0",
        "nvidia.com/gpu.compute.major": str(major),
        "nvidia.com/gpu.compute.minor": str(minor),
        "nvidia.com/gpu.count": str(count),
        "nvidia.com/gpu.family": gpu.family,
        "nvidia.com/gpu.memory": str(gpu.memory_mib),
        "nvidia.com/gpu.mode": "compute",
        "nvidia.com/gpu.present": "true",
        "nvidia.com/gpu.product": gpu.product,
        "nvidia.com/gpu.replicas": "1",
        "nvidia.com/gpu.sharing-strategy": "none",
        "nvidia.com/mig.capable": str(gpu.mig_capable).lower(),
        "nvidia.com/mig.strategy": "single",
    }


DEFAULT_FLEET = (
    NodeGroup("cpu", 2, cpu="32", memory="128Gi", instance_type="m-32"),
    NodeGroup("a100-80g", 2, A100_80G, 8, cpu="96", memory="1360Gi", instance_type="a100-80g-8"),
    NodeGroup("a100-40g", 2, A100_40G, 8, cpu="96", memory="680Gi", instance_type="a100-40g-8"),
    NodeGroup("a10", 2, A10, 4, cpu="48", memory="192Gi", instance_type="a10-4"),
    NodeGroup("t4", 2, T4, 4, cpu="48", memory="192Gi", instance_type="t4-4"),
)
