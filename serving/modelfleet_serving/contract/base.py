"""What the whole contract is made of: names, headers, and words of one meaning."""

from __future__ import annotations

import enum
from typing import Final

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
