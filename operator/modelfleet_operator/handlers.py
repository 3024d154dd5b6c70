"""What kopf watches, and whom it tells. Nothing is decided here.

Events alone are handled: kopf then writes nothing to the objects. Its daemons would hold a deleted object for
their whole cancellation back-off, and its change handlers would keep a copy of the spec in an annotation; our
finalizer is set and taken off by :mod:`.writer` instead. Kopf must not know it: it takes a finalizer of its
own off whatever has no handler that needs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, Final, cast

import kopf

from modelfleet_operator.api import GROUP, VERSION
from modelfleet_operator.fleet import Fleet

LONGEST_PAUSE: Final = 2.0


def handlers() -> kopf.OperatorRegistry:
    """A registry of the operator's handlers; nothing is registered globally."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)  # type: ignore[untyped-decorator]
    def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, "servingpools", registry=registry)  # type: ignore[untyped-decorator]
    async def pool_changed(event: Any, memo: Fleet, **_: Any) -> None:
        memo.saw_pool(event["type"], event["object"])

    @kopf.on.event(GROUP, VERSION, "modeldeployments", registry=registry)  # type: ignore[untyped-decorator]
    async def deployment_changed(event: Any, memo: Fleet, **_: Any) -> None:
        memo.saw_deployment(event["type"], event["object"])

    return registry


class _Pauses:
    """Seconds between two tries of a call, without an end: after its own, kopf and the operator give up.

    An API server may be away for longer, and when it is back nobody shall wait for half a minute.
    """

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1.0)
        yield from repeat(LONGEST_PAUSE)


class _NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]  # published without types
    """Nothing is compared with an earlier state: kopf would copy every object of every event for it."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Nothing."""
        return cast("kopf.BodyEssence", {})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        """Nothing."""
        return None

    def store(self, **_: Any) -> None:
        """Nothing."""


def kopf_settings() -> kopf.OperatorSettings:
    """Kopf as the operator uses it: watches only, in namespaces and kinds that are known beforehand."""
    settings = kopf.OperatorSettings()
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _Pauses()
    # A worker waits for more events of its object before it ends: a limit would let so many objects through
    # in that time and no more.
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 1.0
    settings.queueing.exit_timeout = 1.0
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.posting.enabled = False  # events are our own: on transitions of conditions
    settings.scanning.disabled = True  # needs no permission to list CRDs and namespaces
    return settings
