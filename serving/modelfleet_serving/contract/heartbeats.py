"""Heartbeats: what a replica says of itself, and what the registry answers."""

from __future__ import annotations

from modelfleet_serving.contract.base import EndpointState, Wire


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
