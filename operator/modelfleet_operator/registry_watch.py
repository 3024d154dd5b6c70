"""Follows a pool's registry with long polls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.metrics import ERRORS
from modelfleet_serving.contract import RegistryState

log = logging.getLogger(__name__)

WAIT_SECONDS: Final = 25.0
"""Longest time that a poll is held open."""
PAUSE_SECONDS: Final = 0.2
"""Least time between two looks at the registry: what changes in between is taken in at once."""
ENDPOINTS_PER_SECOND: Final = 5000
"""The same for its answer, which all endpoints are in."""
RETRY_SECONDS: Final = 2.0


@dataclass
class RegistryWatch:
    """Looks at one registry.

    Attributes:
        registry: to poll.
        leadership: of this process.
        last: what was seen last; ``None`` while it is away.
        see: called with each new state, and with ``None`` when it is lost.
    """

    registry: RegistryClient
    leadership: Leadership
    last: Callable[[], RegistryState | None]
    see: Callable[[RegistryState | None], None]

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            seen = self.last()
            # A poll speaks for the term that we have when it begins, and we may be given a later one.
            wait = RETRY_SECONDS if self.leadership.superseded else WAIT_SECONDS
            try:
                state = await self.registry.state(
                    seen.epoch if seen else "", seen.version if seen else -1, wait if seen else 0
                )
            except ClientError as error:
                if seen is not None:
                    log.warning("registry lost: %s", error)
                    self.see(None)
                ERRORS.labels(reason="RegistryUnavailable").inc()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if state is not None:
                self.see(state)
                await asyncio.sleep(max(PAUSE_SECONDS, len(state.endpoints) / ENDPOINTS_PER_SECOND))
