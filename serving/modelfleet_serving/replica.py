"""The Ray Serve deployment that holds one engine: Ray places it, restarts it and tells it to stop.

Tokens never pass through here: routers call the engine directly, and know it from the heartbeats.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import ray

from modelfleet_serving.contract import ApplicationArgs, ReplicaConfig
from modelfleet_serving.serve_ports import confine
from modelfleet_serving.supervisor.supervisor import Supervisor

BIND_HOST: Final = "MODELFLEET_BIND_HOST"
LOG_DIR: Final = "MODELFLEET_LOG_DIR"


class Replica:
    """One engine under a supervisor."""

    async def __init__(self, args: ApplicationArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        # Nothing is waited for: an engine may take half an hour to load, and the registry tells of it.
        node = ray.util.get_node_ip_address()
        confine(node)
        name = f"{args.application}.{secrets.token_hex(3)}"
        self._supervisor = Supervisor(
            args=args,
            replica=name,
            host=bind_host(node),
            log=log_directory() / f"{name}.log",
            node=node,
        )
        self._running = asyncio.create_task(self._supervisor.run(), name="supervisor")
        self._stopping = False

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's ``user_config``, at the start and whenever it changes.

        Nothing is waited for: a replica that takes long here counts as broken.

        Raises:
            ValueError: it is no :class:`ReplicaConfig`.
        """
        try:
            self._supervisor.configure(msgspec.convert(config, ReplicaConfig))
        except msgspec.ValidationError as error:
            raise ValueError(f"configuration of the replica: {error}") from error

    async def check_health(self) -> None:
        """Called by Serve; a failure lets it start another replica, elsewhere if there is room.

        Raises:
            RuntimeError: the supervisor has ended, or its engine fails again and again.
        """
        if self._running.done() and not self._stopping:
            raise RuntimeError(f"the supervisor ended: {self._running.exception()!r}")
        if self._supervisor.fault:
            raise RuntimeError(self._supervisor.fault)
        if self._supervisor.hopeless:
            state = self._supervisor.state
            raise RuntimeError(f"the engine failed {state.failures} times in a row: {state.reason}")

    async def __call__(self) -> str:
        """Serve wants a deployment to be callable; the state is in the registry."""
        return self._supervisor.state.phase.value

    async def __del__(self) -> None:
        """Awaited by Serve on scale-down, update and removal, up to ``graceful_shutdown_timeout_s``."""
        self._stopping = True
        if not self._running.done():
            await self._supervisor.stop()
        await asyncio.gather(self._running, return_exceptions=True)


def bind_host(node: str, environ: Mapping[str, str] = os.environ) -> str:
    """Address for the engine: the one by which Ray knows this node, which on a laptop is loopback."""
    return environ.get(BIND_HOST) or node


def log_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder for the engines' logs."""
    configured = environ.get(LOG_DIR)
    return (
        Path(configured)
        if configured
        else Path(tempfile.gettempdir(), f"modelfleet-{os.getuid()}", "engines")
    )
