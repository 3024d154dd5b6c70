"""The resources of group ``modelfleet.io``: the one source of the CRDs, of validation and of the docs."""

from modelfleet_operator.api.base import (
    API_VERSION,
    FINALIZER,
    GROUP,
    VERSION,
    duration_seconds,
    quantity_value,
)
from modelfleet_operator.api.documents import (
    InvalidResourcesError,
    Problem,
    Resource,
    parse_object,
    parse_resources,
)
from modelfleet_operator.api.engine import EngineSpec
from modelfleet_operator.api.metadata import Metadata
from modelfleet_operator.api.model_deployment import (
    AcceleratorChoice,
    ModelDeployment,
    ModelDeploymentSpec,
    ReplicaBounds,
    Routing,
    Variant,
)
from modelfleet_operator.api.serving_pool import AcceleratorGroup, ServingPool, ServingPoolSpec
from modelfleet_operator.api.status import (
    Condition,
    MeasurementStatus,
    ModelDeploymentStatus,
    PlanStatus,
    RejectionStatus,
    ServingPoolStatus,
    VariantStatus,
)

__all__ = [
    "API_VERSION",
    "FINALIZER",
    "GROUP",
    "VERSION",
    "AcceleratorChoice",
    "AcceleratorGroup",
    "Condition",
    "EngineSpec",
    "InvalidResourcesError",
    "MeasurementStatus",
    "Metadata",
    "ModelDeployment",
    "ModelDeploymentSpec",
    "ModelDeploymentStatus",
    "PlanStatus",
    "Problem",
    "RejectionStatus",
    "ReplicaBounds",
    "Resource",
    "Routing",
    "ServingPool",
    "ServingPoolSpec",
    "ServingPoolStatus",
    "Variant",
    "VariantStatus",
    "duration_seconds",
    "parse_object",
    "parse_resources",
    "quantity_value",
]
