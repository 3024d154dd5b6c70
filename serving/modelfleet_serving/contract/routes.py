"""Routes as the operator writes them, and the table that the registry makes of them for routers."""

from __future__ import annotations

import hashlib

import msgspec

from modelfleet_serving.contract.base import Affinity, EndpointState, Task, Wire


class QueueSettings(Wire, kw_only=True, frozen=True):
    """The holding queue of a model."""

    max_requests: int = 1024
    timeout_seconds: float = 300.0


class VariantRouteSpec(Wire, kw_only=True, frozen=True):
    """A variant as the operator routes it."""

    name: str
    revisions: dict[str, int] = {}
    """Weight by revision: endpoints of other revisions get no new request."""


class RouteSpec(Wire, kw_only=True, frozen=True):
    """One ModelDeployment's routes, without endpoints: those come from the heartbeats."""

    name: str
    """The OpenAI model id."""
    namespace: str
    deployment: str
    variants: list[VariantRouteSpec]
    weights: dict[str, int] = {}
    fallback: list[str] = []
    affinity: Affinity = Affinity.PREFIX
    queue: QueueSettings = QueueSettings()
    task: Task = Task.GENERATE
    adapters: list[str] = []
    suspended: bool = False
    """Requests are refused instead of held: nothing will come."""

    def digest(self) -> str:
        """Stable hash of the content; the registry reports it so that drift is seen without the body."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]


class Endpoint(Wire, kw_only=True, frozen=True):
    """An engine that may be called."""

    id: str
    url: str
    state: EndpointState = EndpointState.READY
    revision: str = ""
    capacity: int | None = None
    adapters: list[str] = []


class VariantRoute(Wire, kw_only=True, frozen=True):
    """A variant with its endpoints."""

    name: str
    endpoints: list[Endpoint] = []
    revision_weights: dict[str, int] = {}
    """Shares of a rollout; empty spreads over all endpoints."""


class ModelRoute(Wire, kw_only=True, frozen=True):
    """One model of the route table."""

    name: str
    namespace: str = "default"
    weights: dict[str, int] = {}
    fallback: list[str] = []
    affinity: Affinity = Affinity.PREFIX
    queue: QueueSettings = QueueSettings()
    variants: list[VariantRoute] = []
    task: Task = Task.GENERATE
    adapters: list[str] = []
    suspended: bool = False
    """Requests are refused instead of held: nothing will come."""


class RouteTable(Wire, kw_only=True, frozen=True):
    """The whole table, as it stands in a file for a standalone router."""

    models: list[ModelRoute] = []


class TableUpdate(Wire, kw_only=True, frozen=True):
    """The registry's answer to a router's long poll: the whole table, or what changed since."""

    epoch: str
    """Changes when the registry starts anew; versions of different epochs don't compare."""
    version: int
    full: bool
    """``models`` is the whole table; otherwise the models that changed."""
    models: list[ModelRoute] = []
    removed: list[str] = []
    """Names of models that are gone."""
