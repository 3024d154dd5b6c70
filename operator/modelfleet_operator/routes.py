"""Keeps the registry's routes as they were decided, also after the registry lost them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from modelfleet_operator.clients.errors import RefusedError
from modelfleet_operator.clients.registry import RegistryClient, SupersededError
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.metrics import ERRORS, ROUTE_WRITES
from modelfleet_serving.contract import RouteSpec

log = logging.getLogger(__name__)

_AT_ONCE: Final = 8


@dataclass
class RouteWriter:
    """Routes of one pool.

    Attributes:
        registry: where they go.
        leadership: of this process; a leader that was replaced writes nothing.
        refused: by ModelDeployment, why the registry did not take its route.
        held: ModelDeployments whose routes are left as they are.
    """

    registry: RegistryClient
    leadership: Leadership = field(default_factory=Leadership)
    refused: dict[str, str] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    _wanted: dict[str, tuple[RouteSpec, str]] = field(default_factory=dict)
    _known: dict[str, str] | None = None
    """Digests that the registry reported, and of what was written since; ``None`` while it is away."""

    def want(self, key: str, route: RouteSpec) -> None:
        """Replace what a ModelDeployment's route shall be."""
        before = self._wanted.get(key)
        if before is None or before[0] != route:
            self._wanted[key] = (route, route.digest())

    def forget(self, key: str) -> None:
        """A ModelDeployment is gone: its route shall go."""
        self._wanted.pop(key, None)
        self.refused.pop(key, None)

    def see(self, known: Mapping[str, str] | None) -> None:
        """Take over what the registry reports; ``None`` while it can't be reached."""
        self._known = None if known is None else dict(known)

    def has(self, key: str) -> bool | None:
        """Whether the registry has a route of a ModelDeployment; ``None`` when nobody knows."""
        return None if self._known is None else key in self._known

    @property
    def due(self) -> bool:
        """Whether the registry has other routes than it shall have."""
        return self._known is not None and bool(self._differing() or self._surplus())

    def _differing(self) -> list[str]:
        known = self._known or {}
        return [key for key, (_, digest) in self._wanted.items() if known.get(key) != digest]

    def _surplus(self) -> set[str]:
        return (self._known or {}).keys() - self._wanted.keys() - self.held

    async def write(self) -> None:
        """Write what differs. What fails is tried again at the next step.

        Raises:
            UnavailableError: the registry does not answer.
        """
        if self._known is None or self.leadership.superseded:
            return
        try:
            # First those that give a name back, then those that may want it.
            await self._each(self._surplus(), self._delete)
            await self._each(self._differing(), self._put)
        except SupersededError as error:  # its next state says by whom
            log.info("routes: %s", error)

    async def complete(self) -> None:
        """Say that there are no routes, or a registry that has just started tells routers nothing.

        Raises:
            UnavailableError: the registry does not answer.
        """
        try:
            await self.registry.complete_routes()
        except RefusedError as error:  # one of an older release: it waits for the first route
            log.info("registry without routes: %s", error)

    async def _each(self, keys: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(key: str) -> None:
            async with limit:
                await work(key)

        results = await asyncio.gather(*(one(key) for key in keys), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _put(self, key: str) -> None:
        route, digest = self._wanted[key]
        try:
            await self.registry.put_route(route)
        except SupersededError:
            raise
        except RefusedError as error:
            if key not in self.refused:
                log.warning("route of %s: %s", key, error)
            self.refused[key] = str(error)
            ERRORS.labels(reason="RouteRefused").inc()
            return
        ROUTE_WRITES.inc()
        self.refused.pop(key, None)
        if self._known is not None:
            self._known[key] = digest

    async def _delete(self, key: str) -> None:
        namespace, _, name = key.partition("/")
        await self.registry.delete_route(namespace, name)
        ROUTE_WRITES.inc()
        if self._known is not None:
            self._known.pop(key, None)
