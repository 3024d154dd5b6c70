"""Health checks and metrics over HTTP: ``/healthz``, ``/readyz``, ``/metrics``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from modelfleet_operator.fleet import Fleet

RESYNC_LIMIT_SECONDS: Final = 60.0
STEP_LIMIT_SECONDS: Final = 240.0
"""Longer than one step with all its time-outs."""


@dataclass
class Health:
    """What the checks look at.

    Attributes:
        fleet: at work; ``None`` while this process stands by.
        standby: whether standing by is what it shall do now.
    """

    fleet: Fleet | None = None
    standby: bool = True
    began: float = field(default_factory=time.monotonic)

    def problems(self, now: float) -> list[str]:
        """Loops that have stood still for too long.

        Args:
            now: monotonic seconds.
        """
        if self.fleet is None:
            return []
        found = []
        if now - self.fleet.heartbeat > RESYNC_LIMIT_SECONDS:
            found.append(f"the resync loop has not turned for {now - self.fleet.heartbeat:.0f} s")
        for runner in self.fleet.runners:
            if runner.failed is not None:
                found.append(f"pool {runner.pool.key} ended: {runner.failed!r}")
            still = now - runner.controller.heartbeat
            if runner.started and still > STEP_LIMIT_SECONDS:
                found.append(f"the loop of pool {runner.pool.key} has not turned for {still:.0f} s")
        return found

    @property
    def ready(self) -> bool:
        """Whether this process does what it shall: work on everything, or stand by."""
        return self.fleet.synced if self.fleet is not None else self.standby


async def serve(health: Health, host: str, port: int) -> web.AppRunner:
    """Start the server; its owner calls ``cleanup()``."""

    async def healthz(_: web.Request) -> web.Response:
        problems = health.problems(time.monotonic())
        return web.Response(text="\n".join(problems) or "ok", status=500 if problems else 200)

    async def readyz(_: web.Request) -> web.Response:
        ready = health.ready
        return web.Response(text="ok" if ready else "starting", status=200 if ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
