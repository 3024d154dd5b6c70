"""The types on the wire between operator, replicas, registry and routers.

Its parts: :mod:`.applications` (operator to Ray Serve), :mod:`.heartbeats` (replica to registry),
:mod:`.routes` (operator to registry to router) and :mod:`.demand` (router to registry to operator). Import
them from here.

Everything here is data: no I/O and no dependency but msgspec. Field names are camelCase on the wire.
Unknown fields are ignored, so that a newer sender can talk to an older receiver; a field is never
given another meaning.

The HTTP interface of the registry, in one place (bearer token on every call but ``/healthz``):

==========================================  =================================================
``POST   /v1/heartbeat``                    :class:`Heartbeat` -> :class:`HeartbeatReply`
``GET    /v1/presence/{replica}``           held open while the replica lives
``PUT    /v1/routes/{namespace}/{name}``    :class:`RouteSpec` -> 204, or 409 while the name is another's
``DELETE /v1/routes/{namespace}/{name}``    -> 204
                                            both: 412 from a leader that has been replaced, see below
``POST   /v1/routes/complete``              there are no further routes, maybe none at all -> 204
``GET    /v1/table?epoch=E&version=V&timeout=S&router=ID``
                                            long poll -> :class:`TableUpdate`, or 304 after S seconds
``POST   /v1/demand``                       :class:`DemandReport` -> 204
``GET    /v1/state?epoch=E&version=V&timeout=S``
                                            long poll for the operator -> :class:`RegistryState`, or 304
``GET    /healthz``, ``GET /metrics``       liveness, Prometheus
==========================================  =================================================
"""

from modelfleet_serving.contract.applications import (
    Adapter,
    ApplicationArgs,
    ApplicationId,
    EngineSettings,
    LoraSettings,
    ReplicaConfig,
    ReplicaResources,
    application_name,
    parse_application_name,
)
from modelfleet_serving.contract.base import (
    HEADER_FALLBACK,
    HEADER_KEEP_ALIVE,
    HEADER_MODEL,
    HEADER_PRIORITY,
    HEADER_REPLICA,
    HEADER_REQUEST_ID,
    HEADER_SESSION,
    HEADER_TERM,
    HEADER_TIMEOUT,
    HEADER_VARIANT,
    REGISTRY_APPLICATION,
    REGISTRY_IMPORT_PATH,
    REGISTRY_PORT,
    REPLICA_DEPLOYMENT,
    REPLICA_IMPORT_PATH,
    Affinity,
    EndpointState,
    Task,
    Wire,
)
from modelfleet_serving.contract.demand import (
    DemandReply,
    DemandReport,
    ModelDemand,
    RegistryState,
    RouterInfo,
    TenantDebt,
    TenantUse,
)
from modelfleet_serving.contract.heartbeats import (
    EngineLoad,
    EngineMemory,
    Heartbeat,
    HeartbeatReply,
)
from modelfleet_serving.contract.routes import (
    Endpoint,
    ModelRoute,
    QueueSettings,
    RouteSpec,
    RouteTable,
    TableUpdate,
    VariantRoute,
    VariantRouteSpec,
)

__all__ = [
    "HEADER_FALLBACK",
    "HEADER_KEEP_ALIVE",
    "HEADER_MODEL",
    "HEADER_PRIORITY",
    "HEADER_REPLICA",
    "HEADER_REQUEST_ID",
    "HEADER_SESSION",
    "HEADER_TERM",
    "HEADER_TIMEOUT",
    "HEADER_VARIANT",
    "REGISTRY_APPLICATION",
    "REGISTRY_IMPORT_PATH",
    "REGISTRY_PORT",
    "REPLICA_DEPLOYMENT",
    "REPLICA_IMPORT_PATH",
    "Adapter",
    "Affinity",
    "ApplicationArgs",
    "ApplicationId",
    "DemandReply",
    "DemandReport",
    "Endpoint",
    "EndpointState",
    "EngineLoad",
    "EngineMemory",
    "EngineSettings",
    "Heartbeat",
    "HeartbeatReply",
    "LoraSettings",
    "ModelDemand",
    "ModelRoute",
    "QueueSettings",
    "RegistryState",
    "ReplicaConfig",
    "ReplicaResources",
    "RouteSpec",
    "RouteTable",
    "RouterInfo",
    "TableUpdate",
    "Task",
    "TenantDebt",
    "TenantUse",
    "VariantRoute",
    "VariantRouteSpec",
    "Wire",
    "application_name",
    "parse_application_name",
]
