"""`modelfleet up`: the platform on one machine.

The same planner, applications, registry and router as in a cluster; only the store is files, and Ray is
started here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiohttp

from modelfleet_operator.api import (
    Condition,
    InvalidResourcesError,
    ModelDeployment,
    ModelDeploymentStatus,
    ServingPool,
)
from modelfleet_operator.clients.local_ray import LocalRay
from modelfleet_operator.clients.model_hub import ModelHub
from modelfleet_operator.clients.processes import ChildProcess, free_port
from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_operator.controller import PoolController
from modelfleet_operator.facts import FactsCache
from modelfleet_operator.local_pool import local_pool
from modelfleet_operator.local_state import LocalInfo, LocalState
from modelfleet_operator.local_store import Resources, load, watch
from modelfleet_operator.reconcile.conditions import Finding
from modelfleet_operator.reconcile.status import deployment_status, refused_status
from modelfleet_operator.reports import Report

log = logging.getLogger(__name__)

ROUTER_READY_SECONDS: Final = 30.0
ROUTER_DRAIN_SECONDS: Final = 5.0
LOOPBACK: Final = "127.0.0.1"


class UpError(Exception):
    """`modelfleet up` can't go on."""


@dataclass
class LocalPlatform:
    """One run of `modelfleet up`.

    Attributes:
        paths: files and folders with resources.
        listen: address of the router, loopback by default.
        state: where the run publishes what it does.
        say: shows a line to the user.
        router_args: further options of the router.
    """

    paths: Sequence[Path]
    listen: str
    state: LocalState
    say: Callable[[str], None]
    router_args: Sequence[str] = ()
    _info: LocalInfo | None = None
    _statuses: dict[str, ModelDeploymentStatus] = field(default_factory=dict)
    _shown: dict[str, str] = field(default_factory=dict)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then leave nothing running.

        Raises:
            InvalidResourcesError: the files are wrong.
            UpError: something that is needed does not start.
        """
        resources = load(self.paths)
        pool = _the_pool(resources)
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self._stop.set)
        self.state.acquire()
        try:
            async with AsyncExitStack() as stack:
                await self._serve(stack, resources, pool)
        finally:
            self.state.release()
            for sig in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(sig)

    async def _serve(self, stack: AsyncExitStack, resources: Resources, pool: ServingPool) -> None:
        ray = LocalRay(self.state.directory, on_progress=self.say)
        starting = asyncio.create_task(ray.start(), name="start-ray")
        stack.push_async_callback(ray.stop)
        if not await self._unless_stopped(starting):
            return
        registry_port = free_port()
        registry_url = f"http://{LOOPBACK}:{registry_port}"
        session = await stack.enter_async_context(aiohttp.ClientSession())
        router = await self._start_router(stack, registry_url, ray.token_file)
        self._info = LocalInfo(
            pid=os.getpid(),
            router=f"http://{self.listen}",
            registry=registry_url,
            dashboard=ray.dashboard_url,
            logs=str(self.state.directory),
        )
        facts = FactsCache(ModelHub())
        stack.push_async_callback(facts.close)
        controller = PoolController(
            pool=pool,
            ray=RayServeClient(session, ray.dashboard_url, ray.token),
            registry=RegistryClient(session, registry_url, ray.token),
            registry_address=registry_url,
            facts=facts,
            report=self._report,
            serve_registry={"host": LOOPBACK, "port": registry_port},
        )
        controller.set_deployments(_in_pool(resources.deployments, pool))
        await self._report_strays(resources, pool)
        await self._until_stopped(controller, router, ray, pool)

    async def _until_stopped(
        self, controller: PoolController, router: ChildProcess, ray: LocalRay, pool: ServingPool
    ) -> None:
        tasks = {
            asyncio.create_task(self._stop.wait(), name="stop"),
            asyncio.create_task(controller.run(), name="controller"),
            asyncio.create_task(self._follow_files(controller, pool), name="files"),
            asyncio.create_task(router.wait(), name="router"),
            asyncio.create_task(ray.wait(), name="ray"),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            if task.get_name() == "stop":
                self.say("stopping: engines, Ray and router end")
                return
            if error := task.exception():
                raise error
            raise UpError(f"{task.get_name()} ended by itself; its log is in {self.state.directory}")

    async def _unless_stopped(self, starting: asyncio.Task[None]) -> bool:
        """Whether something has started before the user wanted to stop."""
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if starting.done():
            starting.result()
            return not self._stop.is_set()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return False

    async def _start_router(self, stack: AsyncExitStack, registry: str, token_file: Path) -> ChildProcess:
        command = [sys.executable, "-m", "modelfleet_serving.router", "--listen", self.listen]
        command += ["--registry", registry, "--token-file", str(token_file)]
        command += ["--drain-timeout", f"{ROUTER_DRAIN_SECONDS:g}", *self.router_args]
        router = ChildProcess(command, log=self.state.directory / "router.log")
        await router.start()
        stack.push_async_callback(router.stop, ROUTER_DRAIN_SECONDS + 2)
        await router.until_http_ok(f"http://{self.listen}/healthz", ROUTER_READY_SECONDS)
        self.say(f"router: http://{self.listen}/v1")
        return router

    async def _follow_files(self, controller: PoolController, pool: ServingPool) -> None:
        async for change in watch(self.paths):
            if isinstance(change, InvalidResourcesError):
                self.say("the change is not taken over; what runs goes on:")
                for problem in change.problems:
                    self.say(f"  {problem}")
                continue
            for key in self._statuses.keys() - change.deployments.keys():
                self._statuses.pop(key)
                self._shown.pop(key, None)
                self.say(f"{key}: removed; its replicas drain")
            controller.set_deployments(_in_pool(change.deployments, pool))
            await self._report_strays(change, pool)

    async def _report_strays(self, resources: Resources, pool: ServingPool) -> None:
        """Say of deployments in other pools that nothing here runs them."""
        mine = _in_pool(resources.deployments, pool)
        self._publish(
            [
                (d, refused_status(d, "PoolNotFound", f"there is no pool {d.spec.pool} here"), ())
                for key, d in resources.deployments.items()
                if key not in mine
            ]
        )

    async def _report(self, reports: list[Report]) -> None:
        self._publish(
            [(r.deployment, r.findings, r.decision.variants if r.decision else ()) for r in reports]
        )

    def _publish(
        self, entries: Sequence[tuple[ModelDeployment, Sequence[Finding], Sequence[object]]]
    ) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for deployment, findings, rows in entries:
            before = self._statuses.get(deployment.key)
            conditions: Sequence[Condition] = before.conditions if before else ()
            status = deployment_status(deployment, rows, findings, conditions, now)  # type: ignore[arg-type]
            self._statuses[deployment.key] = status
            self._show(deployment, status)
        if self._info is not None:
            documents = {d.key: d.to_dict() for d, _, _ in entries}
            old = {_key_of(d): d for d in self._info.deployments}
            merged = {k: v for k, v in (old | documents).items() if k in self._statuses}
            for key, document in merged.items():
                document["status"] = self._statuses[key].to_dict()
            self._info.deployments = list(merged.values())
            self.state.publish(self._info)

    def _show(self, deployment: ModelDeployment, status: ModelDeploymentStatus) -> None:
        """Say a transition once."""
        for row in status.variants:
            key = f"{deployment.key}:{row.name}"
            line = f"{deployment.model_name}:{row.name}  {row.reason}"
            if row.accelerator:
                line += f"  on {row.accelerator}, {row.ready_replicas}/{row.replicas} ready"
            if row.message and row.reason not in ("Pending", "ReadingModel", "Unknown"):
                line += f"\n    {row.message}"
            if self._shown.get(key) != line:
                self._shown[key] = line
                self.say(line)
        refused = next((c for c in status.conditions if c.type == "Accepted" and c.status == "False"), None)
        if refused is not None and self._shown.get(deployment.key) != refused.message:
            self._shown[deployment.key] = refused.message
            self.say(f"{deployment.key}: {refused.reason}: {refused.message}")


def _the_pool(resources: Resources) -> ServingPool:
    """The pool of the files, or this machine's."""
    if len(resources.pools) > 1:
        raise UpError(f"one machine is one pool, but the files have {', '.join(resources.pools)}")
    if resources.pools:
        return next(iter(resources.pools.values()))
    names = {d.spec.pool for d in resources.deployments.values()} or {"default"}
    namespace = next((d.metadata.namespace for d in resources.deployments.values()), "default")
    return local_pool("default" if "default" in names else min(names), namespace)


def _in_pool(deployments: dict[str, ModelDeployment], pool: ServingPool) -> dict[str, ModelDeployment]:
    return {key: d for key, d in deployments.items() if d.spec.pool == pool.metadata.name}


def _key_of(document: dict[str, object]) -> str:
    metadata = document["metadata"]
    assert isinstance(metadata, dict)  # noqa: S101  our own to_dict
    return f"{metadata.get('namespace', 'default')}/{metadata['name']}"
