"""Makes Ray Serve run the applications that were decided, unless another operator is at work."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.metrics import APPLICATION_WRITES
from modelfleet_operator.reconcile.fleet_config import Difference, FleetConfig
from modelfleet_operator.reconcile.observed import PoolSight

log = logging.getLogger(__name__)


@dataclass
class ApplicationWriter:
    """Applications of one pool.

    Attributes:
        pool: its ``namespace/name``, for the log.
        ray: where they go.
        config: what shall run.
        sight: what runs, as it was last seen.
        leadership: whether another operator is, or may be, at work.
    """

    pool: str
    ray: RayServeClient
    config: FleetConfig
    sight: PoolSight
    leadership: Leadership
    blocked: bool = False
    """Whether the last write was left to another operator."""
    _written: set[str] = field(default_factory=set)
    """Applications that Ray was last known to run by our doing."""

    def adopt(self, names: Iterable[str]) -> None:
        """Take what ran before the first step for our own doing."""
        self._written = set(names)

    def difference(self, dirty: set[str]) -> Difference:
        """What a PUT would change for these ModelDeployments, those not wanted, and the registry."""
        return self.config.difference(self.sight, dirty | self.config.strays(self.sight))

    async def write(self, dirty: set[str]) -> bool:
        """Write what differs; whether anything was written.

        A PUT says all applications: what others changed must have been seen just before.

        Raises:
            ClientError: Ray can't be reached or refuses.
        """
        difference = self.difference(dirty)
        self.blocked = bool(difference) and self._others_at_work()
        if not difference or self.blocked:
            return False
        log.info("pool %s: %d applications set, %d removed", self.pool, len(difference.set),
                 len(difference.removed))  # fmt: skip
        await self.ray.put(self.config.body(self.sight))
        APPLICATION_WRITES.inc()
        self._written = set(self.sight.applications) | difference.set
        return True

    def _others_at_work(self) -> bool:
        """Whether another operator leads now, or has written applications while we can't know who leads.

        Ray refuses no writer: what a registry told and what runs is all that shows it.
        """
        if self.leadership.superseded:
            return True
        if not self.leadership.cut_off:
            return False
        seen = {name for key in iter(self.sight.keys()) for name in self.sight.applications_of(key)}
        theirs = seen - self._written
        if theirs:
            log.warning("pool %s: another operator is at work (%s): nothing is written", self.pool,
                        ", ".join(sorted(theirs)[:3]))  # fmt: skip
        return bool(theirs)
