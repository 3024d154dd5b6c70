"""The types on the wire between operator, replicas, registry and routers.

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

from __future__ import annotations

import enum
import hashlib
from typing import Any, Final

import msgspec

REGISTRY_PORT: Final = 8267
REGISTRY_APPLICATION: Final = "modelfleet.registry"
REGISTRY_IMPORT_PATH: Final = "modelfleet_serving.registry.app:build"
REPLICA_IMPORT_PATH: Final = "modelfleet_serving.app:build"
REPLICA_DEPLOYMENT: Final = "Replica"

HEADER_MODEL: Final = "x-modelfleet-model"
HEADER_VARIANT: Final = "x-modelfleet-variant"
HEADER_REPLICA: Final = "x-modelfleet-replica"
HEADER_FALLBACK: Final = "x-modelfleet-fallback"
HEADER_PRIORITY: Final = "x-modelfleet-priority"
HEADER_SESSION: Final = "x-modelfleet-session"
HEADER_TIMEOUT: Final = "x-modelfleet-timeout"
"""Seconds that a client gives its request, as a decimal number."""
HEADER_KEEP_ALIVE: Final = "x-modelfleet-keepalive"
"""Seconds of silence after which a streaming client wants a comment, as a decimal number."""
HEADER_REQUEST_ID: Final = "x-request-id"
HEADER_TERM: Final = "x-modelfleet-term"
"""Which leadership an operator speaks for; grows with each leader. The registry refuses routes of a term
below the highest that it has heard of: a leader that is cut off does not know that another has taken over.
Operators without leader election send none."""


class Wire(msgspec.Struct, rename="camel", kw_only=True, frozen=True, omit_defaults=True):
    """Base of every message: immutable, camelCase on the wire, defaults left out."""


class EndpointState(enum.StrEnum):
    """What the supervisor of an engine says of it. Only ``READY`` gets new requests."""

    STARTING = "Starting"
    READY = "Ready"
    DRAINING = "Draining"
    SLEEPING = "Sleeping"
    FAILED = "Failed"


class Affinity(enum.StrEnum):
    """How a request is bound to a replica."""

    PREFIX = "Prefix"
    SESSION = "Session"
    NONE = "None"


class Task(enum.StrEnum):
    """What a model does; decides which endpoints its engine serves."""

    GENERATE = "Generate"
    EMBED = "Embed"
    RERANK = "Rerank"
    SCORE = "Score"
    CLASSIFY = "Classify"
    TRANSCRIBE = "Transcribe"


# --- Applications: what the operator asks Ray Serve to run ---------------------------------------


class LoraSettings(Wire, kw_only=True, frozen=True):
    """LoRA as the engine is started with it."""

    max_loras: int = 1
    """Adapters in one batch."""
    max_rank: int = 16
    max_cpu_loras: int | None = None


class EngineSettings(Wire, kw_only=True, frozen=True):
    """One engine's start, in the field's common terms. ``None`` leaves the engine's own default."""

    type: str
    """A name in the engine registry: ``vLLM``, ``SGLang``, ``Simulator``."""
    version: str | None = None
    max_model_len: int | None = None
    """Context length in tokens."""
    gpu_memory_percent: int | None = None
    """Share of each GPU's memory that the engine may take, 1..100."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache per rank, in bytes; takes the place of the share where the engine allows it."""
    max_num_seqs: int | None = None
    chunked_prefill: bool | None = None
    max_num_batched_tokens: int | None = None
    """Tokens in one step: the batch size of chunked prefill."""
    prefix_caching: bool | None = None
    dtype: str | None = None
    """``bfloat16``, ``float16`` or ``float32``."""
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    """A method for the engine to apply at load; ``None`` reads it from the checkpoint."""
    load_format: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    lora: LoraSettings | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    multimodal_limits: dict[str, int] = {}
    """Items a prompt may hold, by modality: ``{"image": 2}``."""
    trust_remote_code: bool = False
    args: dict[str, Any] = {}
    """Further command-line options, without their dashes; ``True`` renders a bare flag, ``False`` its
    ``--no-`` form, a list repeats the values, an object is passed as JSON."""
    env: dict[str, str] = {}


class Adapter(Wire, kw_only=True, frozen=True):
    """A LoRA adapter served beside its base model, under a model name of its own."""

    name: str
    source: str


class ReplicaResources(Wire, kw_only=True, frozen=True):
    """What Ray reserves for one replica."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    accelerator_type: str | None = None
    """Ray's own accelerator type, such as ``A10G``."""
    resources: dict[str, float] = {}
    """Custom Ray resources, such as ``{"accelerator:A10": 0.001}``."""


class ApplicationArgs(Wire, kw_only=True, frozen=True):
    """The ``args`` of one Ray Serve application: one (model, variant, revision)."""

    namespace: str
    deployment: str
    """``metadata.name`` of the ModelDeployment."""
    model: str
    """The OpenAI model id, also the engine's served model name."""
    variant: str
    revision: str
    source: str
    """Where the weights are: ``hf://``, ``pvc://``, ``s3://``, ``gs://``, ``oci://``, ``file://``."""
    registry: str
    """Base URL of the registry."""
    engine: EngineSettings
    task: Task = Task.GENERATE
    accelerator: str = "CPU"
    resources: ReplicaResources = ReplicaResources()
    start_timeout_seconds: float = 1800.0
    """Longest time from an engine's start to its readiness."""
    drain_timeout_seconds: float = 600.0
    """Longest time that running requests are given when the replica stops."""

    @property
    def application(self) -> str:
        """Name of the Ray Serve application."""
        return application_name(self.namespace, self.deployment, self.variant, self.revision)


class ReplicaConfig(Wire, kw_only=True, frozen=True):
    """The ``user_config`` of an application's deployment: what changes in replicas that go on running."""

    adapters: list[Adapter] = []
    """The engine takes adapters where ``engine.lora`` is set."""


def application_name(namespace: str, deployment: str, variant: str, revision: str) -> str:
    """Name of the Ray Serve application of one (model, variant, revision)."""
    return f"{namespace}.{deployment}.{variant}.{revision}"


class ApplicationId(Wire, kw_only=True, frozen=True):
    """The parts of an application's name."""

    namespace: str
    deployment: str
    variant: str
    revision: str


def parse_application_name(name: str) -> ApplicationId | None:
    """The parts of an application's name, or ``None`` for one that is not ours.

    A resource's name may hold dots; namespaces, variants and revisions can't.
    """
    namespace, _, rest = name.partition(".")
    parts = rest.rsplit(".", 2)
    if not namespace or len(parts) != 3 or not all(parts):
        return None
    return ApplicationId(namespace=namespace, deployment=parts[0], variant=parts[1], revision=parts[2])


# --- Heartbeats: what a replica says of itself ---------------------------------------------------


class EngineLoad(Wire, kw_only=True, frozen=True):
    """What the engine reports of its work."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """0..1"""


class EngineMemory(Wire, kw_only=True, frozen=True):
    """What the engine reported of its memory at boot; ``None`` where it said nothing."""

    weights_gib: float | None = None
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    max_model_len: int | None = None


class Heartbeat(Wire, kw_only=True, frozen=True):
    """Sent on every change of state and as often as the registry asks for."""

    id: str
    """Unique for the life of a replica actor."""
    application: str
    model: str
    url: str
    """Base URL of the engine's HTTP server; empty before it has one."""
    state: EndpointState
    sequence: int
    """Grows with each heartbeat of a replica: a late one never overwrites a newer one."""
    adapters: list[str] = []
    """LoRA adapters that are loaded."""
    adapter_problems: dict[str, str] = {}
    """Why adapters are not loaded that shall be, by name."""
    capacity: int | None = None
    """Requests that the engine runs at once."""
    load: EngineLoad = EngineLoad()
    memory: EngineMemory | None = None
    accelerator: str = ""
    node: str = ""
    restarts: int = 0
    reason: str = ""
    """CamelCase, stable."""
    message: str = ""
    """For people; with the last lines of the engine's log when it failed."""
    gone: bool = False
    """The last heartbeat of a replica that ended on purpose."""


class HeartbeatReply(Wire, kw_only=True, frozen=True):
    """What the registry wants of a replica."""

    interval_seconds: float
    lease_seconds: float
    """Without a heartbeat for so long the endpoint is dropped from the table."""
    table_version: int
    confirmed_version: int
    """Every live router has taken over at least this version: a replica that drains knows from
    ``confirmed_version >= table_version`` of its own change that no new request can come."""
    epoch: str = ""


# --- Routes and the route table ------------------------------------------------------------------


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


# --- Demand: what routers say of the traffic -----------------------------------------------------


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
