"""The accelerators that a pool may list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final

import yaml

CPU: Final = "CPU"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One entry of ``accelerators.yaml``.

    Attributes:
        name: as pools and variants call it.
        vendor: ``NVIDIA``, ``Huawei`` or ``CPU``.
        memory_gib: what the driver shows to a process; 0 for CPU, whose memory is the node's.
        compute_capability: NVIDIA's (major, minor); ``None`` for others.
        dtypes: activation types with native support.
        ray_type: Ray's accelerator type.
        resource: Kubernetes extended resource.
        product_labels: values of ``nvidia.com/gpu.product``.
        relative_cost: price of one, relative to a T4.
        slice: a part of a GPU: no tensor parallelism over several.
    """

    name: str
    vendor: str
    memory_gib: float
    compute_capability: tuple[int, int] | None
    dtypes: frozenset[str]
    ray_type: str | None
    resource: str | None
    product_labels: tuple[str, ...]
    relative_cost: float
    slice: bool

    @property
    def is_cpu(self) -> bool:
        """Whether models run in host memory."""
        return self.vendor == "CPU"

    @property
    def capability_name(self) -> str:
        """Compute capability as people write it: ``8.6``."""
        return ".".join(map(str, self.compute_capability)) if self.compute_capability else "none"


def _parse(entry: Mapping[str, Any]) -> Accelerator:
    capability = entry.get("computeCapability")
    vendor = str(entry["vendor"])
    major, _, minor = str(capability).partition(".")
    return Accelerator(
        name=str(entry["name"]),
        vendor=vendor,
        memory_gib=float(entry["memoryGiB"]),
        compute_capability=(int(major), int(minor)) if capability else None,
        dtypes=frozenset(entry["dtypes"]),
        ray_type=entry.get("rayType"),
        resource=entry.get("resource", "nvidia.com/gpu" if vendor == "NVIDIA" else None),
        product_labels=tuple(entry.get("productLabels", ())),
        relative_cost=float(entry["relativeCost"]),
        slice=bool(entry.get("slice", False)),
    )


@cache
def accelerators() -> Mapping[str, Accelerator]:
    """All of them by name."""
    text = files(__package__).joinpath("accelerators.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)["accelerators"]
    return MappingProxyType({entry["name"]: _parse(entry) for entry in entries})


def accelerator(name: str) -> Accelerator | None:
    """One of them, or ``None`` where the catalogue doesn't know the name."""
    return accelerators().get(name)


def by_product_label(label: str) -> Accelerator | None:
    """The accelerator whose nodes carry this ``nvidia.com/gpu.product`` label."""
    return next((a for a in accelerators().values() if label in a.product_labels), None)
