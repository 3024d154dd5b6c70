"""Prometheus metrics of the operator."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

RECONCILES: Final = Counter(
    "modelfleet_operator_reconciles_total", "Reconcile steps of single ModelDeployments."
)
STEP_SECONDS: Final = Histogram(
    "modelfleet_operator_step_duration_seconds",
    "Time of one step of a pool: observe, plan, decide, apply.",
    ("pool",),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
QUEUE: Final = Gauge(
    "modelfleet_operator_queue_length", "ModelDeployments that wait for the next step.", ("pool",)
)
STATUS_QUEUE: Final = Gauge("modelfleet_operator_status_queue_length", "Status writes that wait.")
STATUS_WRITES: Final = Counter(
    "modelfleet_operator_status_writes_total", "Statuses written to the API server."
)
APPLICATION_WRITES: Final = Counter(
    "modelfleet_operator_application_writes_total", "PUTs of the set of applications to Ray Serve."
)
ROUTE_WRITES: Final = Counter("modelfleet_operator_route_writes_total", "Routes written to the registry.")
ERRORS: Final = Counter(
    "modelfleet_operator_errors_total", "Failed calls and refused resources.", ("reason",)
)
CONDITIONS: Final = Gauge(
    "modelfleet_operator_conditions",
    "Resources by condition and its status.",
    ("kind", "type", "status"),
)
ACCELERATORS: Final = Gauge(
    "modelfleet_operator_accelerators", "Accelerators of a pool by state.", ("pool", "type", "state")
)
LEADER: Final = Gauge("modelfleet_operator_leader", "1 while this process works, 0 while it stands by.")
