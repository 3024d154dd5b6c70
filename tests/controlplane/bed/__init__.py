"""A real Kubernetes control plane for tests, from Go modules: see docs/testbed.md."""

from tests.controlplane.bed.audit import AuditEvent, AuditLog, Permission, permissions
from tests.controlplane.bed.build import BuildError, ensure
from tests.controlplane.bed.cluster import Cluster, CommandError
from tests.controlplane.bed.control_plane import ControlPlane
from tests.controlplane.bed.faults import Fault, FaultProxy
from tests.controlplane.bed.nodes import DEFAULT_FLEET, GPU, GPU_TOLERATION, NodeGroup
from tests.controlplane.bed.pods import StandIn
from tests.controlplane.bed.process import Component, ComponentError, wait_until

__all__ = [
    "DEFAULT_FLEET",
    "GPU",
    "GPU_TOLERATION",
    "AuditEvent",
    "AuditLog",
    "BuildError",
    "Cluster",
    "CommandError",
    "Component",
    "ComponentError",
    "ControlPlane",
    "Fault",
    "FaultProxy",
    "NodeGroup",
    "Permission",
    "StandIn",
    "ensure",
    "permissions",
    "wait_until",
]
