"""The pool of one machine: what `modelfleet up` runs on when the files name none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from typing import Any, Final

from modelfleet_operator.api import ServingPool
from modelfleet_operator.catalog.accelerators import accelerators

GIB: Final = 2**30
_CPU_SHARE: Final = 0.8
"""Share of the free memory that engines on the CPU may plan with."""


def local_pool(name: str, namespace: str) -> ServingPool:
    """A pool with this machine's GPUs, or with its CPU where it has none."""
    return ServingPool.model_validate(
        {
            "apiVersion": "modelfleet.io/v1alpha1",
            "kind": "ServingPool",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                # Filled in once the local cluster has an address; the schema asks for one.
                "ray": {"address": "http://127.0.0.1"},
                "accelerators": [*_gpus(), _cpu()],
            },
        }
    )


def _cpu() -> dict[str, Any]:
    cores = os.cpu_count() or 1
    return {
        "type": "CPU",
        "gpusPerNode": 0,
        "cpusPerNode": str(cores),
        "memoryPerNode": f"{max(1, int(_available_memory() * _CPU_SHARE / GIB))}Gi",
        "minNodes": 1,
        "maxNodes": 1,
    }


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> list[dict[str, Any]]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    # NVIDIA's feature discovery labels nodes with the same name, blanks replaced.
    labels = {label: kind.name for kind in accelerators().values() for label in kind.product_labels}
    products = [line.strip().replace(" ", "-") for line in output.splitlines()]
    counts = Counter(labels[product] for product in products if product in labels)
    return [
        {"type": kind, "gpusPerNode": count, "minNodes": 1, "maxNodes": 1} for kind, count in counts.items()
    ]
