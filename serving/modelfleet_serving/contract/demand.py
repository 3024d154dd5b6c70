"""Demand: what routers say of the traffic, and what the operator observes through the registry."""

from __future__ import annotations

from modelfleet_serving.contract.base import Wire
from modelfleet_serving.contract.heartbeats import Heartbeat


class ModelDemand(Wire, kw_only=True, frozen=True):
    """Demand for one variant since the last report; ``variant`` is empty where none was chosen yet."""

    model: str
    variant: str = ""
    in_flight: int = 0
    queued: int = 0
    requests: int = 0
    """Arrivals since the last report."""
    failures: int = 0
    time_to_first_byte_seconds: float | None = None
    """Mean since the last report."""


class DemandReport(Wire, kw_only=True, frozen=True):
    """One router's report."""

    router: str
    epoch: str = ""
    version: int = 0
    """The table that this router uses."""
    interval_seconds: float = 1.0
    models: list[ModelDemand] = []


class RouterInfo(Wire, kw_only=True, frozen=True):
    """A router that the registry knows."""

    id: str
    version: int
    seen_seconds_ago: float


class RegistryState(Wire, kw_only=True, frozen=True):
    """What the operator observes through the registry."""

    epoch: str
    version: int
    warming: bool = False
    """Just started: endpoints that are alive may not have reported yet. Conclude nothing from absence."""
    endpoints: list[Heartbeat] = []
    routes: dict[str, str] = {}
    """Digest of each route by ``namespace/name``."""
    demand: list[ModelDemand] = []
    """Summed over routers: gauges as they are, ``requests`` over the last minute."""
    routers: list[RouterInfo] = []
    term: int | None = None
    """The highest term of leadership that an operator has spoken for."""
