"""The registry as a Ray Serve application of its own, with an HTTP port of its own on the head node."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import msgspec
import ray
from ray import serve

from modelfleet_serving.contract import REGISTRY_PORT
from modelfleet_serving.ray_token import authentication_disabled, load_token
from modelfleet_serving.registry.server import PortTakenError, RegistryServer
from modelfleet_serving.serve_ports import confine

_log = logging.getLogger(__name__)

BIND_SECONDS: Final = 60.0
"""Serve starts a new replica before it ends the old one, which holds the port until then."""
HEAD_NODE: Final = {"node:__internal_head__": 0.001}
"""Ray's own resource of the head node: the registry's address must not wander."""


class RegistryArgs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The application's arguments."""

    host: str = "0.0.0.0"  # noqa: S104  routers are on other nodes; every call needs the token
    port: int = REGISTRY_PORT


class RegistryReplica:
    """Holds the server; nobody calls it through Serve."""

    async def __init__(self, args: RegistryArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        confine(ray.util.get_node_ip_address())
        token = load_token()
        if token is None and not authentication_disabled():
            raise RuntimeError("the registry has no token: Ray's authentication has none for it")
        self._stop = asyncio.Event()
        self._serving = asyncio.create_task(self._serve(args, token), name="registry")

    async def _serve(self, args: RegistryArgs, token: str | None) -> None:
        # Not awaited at the start: the predecessor goes only once we are there.
        async with RegistryServer(token).running(args.host, args.port, BIND_SECONDS):
            await self._stop.wait()

    async def check_health(self) -> None:
        """Called by Serve.

        Raises:
            RuntimeError: the server has ended.
        """
        if self._serving.done() and not self._stop.is_set():
            error = self._serving.exception()
            reason = str(error) if isinstance(error, PortTakenError) else repr(error)
            raise RuntimeError(f"the registry's server ended: {reason}")

    async def __call__(self) -> str:
        """Serve wants a deployment to be callable."""
        return "ok"

    async def __del__(self) -> None:
        """Awaited by Serve: let go of the port."""
        self._stop.set()
        await asyncio.gather(self._serving, return_exceptions=True)


def build(args: dict[str, Any]) -> serve.Application:
    """The application.

    Raises:
        ValueError: an argument is unknown or of the wrong type.
    """
    try:
        settings = msgspec.convert(args, RegistryArgs)
    except msgspec.ValidationError as error:
        raise ValueError(f"arguments of the registry: {error}") from error
    deployment = serve.deployment(
        RegistryReplica,
        name="Registry",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": HEAD_NODE},
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5,
        health_check_timeout_s=10,
    )
    return deployment.bind(settings)
