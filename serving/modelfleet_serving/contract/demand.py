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


Rates = tuple[float, float, float]
"""Seconds of a minute's allowance: of requests, input tokens and output tokens."""


class TenantUse(Wire, kw_only=True, frozen=True):
    """What one tenant does at one router."""

    tenant: int
    """Hash of the tenant's name; the registry need not know names."""
    charged: Rates = (0.0, 0.0, 0.0)
    """Since the last report that was answered. Below 0 where reservations were given back."""
    owed: Rates = (0.0, 0.0, 0.0)
    """Until all is paid off, as this router sees it: for a registry that has just begun."""
    running: int = 0
    """Requests in flight."""


class TenantDebt(Wire, kw_only=True, frozen=True):
    """What one tenant has used at all routers."""

    tenant: int
    owed: Rates = (0.0, 0.0, 0.0)
    """Until all is paid off."""
    running: int = 0
    """Requests in flight at the other routers."""


class DemandReply(Wire, kw_only=True, frozen=True):
    """The registry's answer to a router's report."""

    routers: int = 1
    """Routers that are alive, with the one that asks."""
    tenants: list[TenantDebt] = []


class DemandReport(Wire, kw_only=True, frozen=True):
    """One router's report."""

    router: str
    epoch: str = ""
    version: int = 0
    """The table that this router uses."""
    interval_seconds: float = 1.0
    models: list[ModelDemand] = []
    tenants: list[TenantUse] = []


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
