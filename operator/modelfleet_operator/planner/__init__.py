"""Which variant runs on which accelerator: pure functions from facts and capacity to plans.

Nothing here does I/O, knows the time or depends on chance: the same input gives the same plan. Start at
:func:`plan_all`; the types are in :mod:`.types`.
"""

from modelfleet_operator.planner.adapters import AdapterFacts
from modelfleet_operator.planner.facts import ModelFacts, ModelUnavailable
from modelfleet_operator.planner.placement import plan_all, plan_variant
from modelfleet_operator.planner.types import (
    AcceleratorGroup,
    AcceleratorPreference,
    Measurement,
    NodeCapacity,
    PlanResult,
    PoolView,
    Rejection,
    VariantPlan,
    VariantRequest,
)

__all__ = [
    "AcceleratorGroup",
    "AcceleratorPreference",
    "AdapterFacts",
    "Measurement",
    "ModelFacts",
    "ModelUnavailable",
    "NodeCapacity",
    "PlanResult",
    "PoolView",
    "Rejection",
    "VariantPlan",
    "VariantRequest",
    "plan_all",
    "plan_variant",
]
