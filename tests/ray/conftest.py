"""One local Ray cluster for all tests here, with the registry as its application."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest

from modelfleet_operator.clients.local_ray import LocalRay
from modelfleet_serving.contract import (
    REGISTRY_APPLICATION,
    REGISTRY_IMPORT_PATH,
    REPLICA_DEPLOYMENT,
    REPLICA_IMPORT_PATH,
    Heartbeat,
    RegistryState,
    ReplicaConfig,
    RouteSpec,
    TableUpdate,
    VariantRouteSpec,
)

START_SECONDS = 90.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.ray)


async def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Wait until something awaitable or plain is true."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.1)


class Cluster:
    """What tests do with the cluster: set applications, ask the registry, follow the table as a router."""

    def __init__(self, ray: LocalRay, registry_port: int) -> None:
        self.ray = ray
        self.registry_port = registry_port
        self.registry = f"http://127.0.0.1:{registry_port}"
        self.folder = ray.directory
        self.applications: dict[str, dict[str, Any]] = {
            REGISTRY_APPLICATION: {
                "name": REGISTRY_APPLICATION,
                "route_prefix": None,
                "import_path": REGISTRY_IMPORT_PATH,
                "args": {"host": "127.0.0.1", "port": registry_port},
            }
        }

    async def call(
        self, method: str, url: str, body: Any = None, limit_seconds: float = 60
    ) -> tuple[int, bytes]:
        headers = {"authorization": f"Bearer {self.ray.token()}", "content-type": "application/json"}
        limit = aiohttp.ClientTimeout(total=limit_seconds)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.request(method, url, data=data, headers=headers) as answer,
        ):
            return answer.status, await answer.read()

    async def apply(self) -> None:
        url = self.ray.dashboard_url + "/api/serve/applications/"
        body = {"proxy_location": "Disabled", "applications": list(self.applications.values())}
        status, content = await self.call("PUT", url, body)
        assert status == 200, content

    def set(
        self, deployment: str, replicas: int = 1, config: ReplicaConfig | None = None, **args: Any
    ) -> str:
        """Describe an application; :meth:`apply` carries it out."""
        name = f"default.{deployment}.a.r1"
        defaults: dict[str, Any] = {
            "namespace": "default",
            "deployment": deployment,
            "model": deployment,
            "variant": "a",
            "revision": "r1",
            "source": f"file://{self.folder}",
            "registry": self.registry,
            "engine": {"type": "Simulator"},
            "resources": {"numCpus": 0.5},
            "drainTimeoutSeconds": 30,
        }
        self.applications[name] = {
            "name": name,
            "route_prefix": None,
            "import_path": REPLICA_IMPORT_PATH,
            "args": defaults | args,
            "deployments": [
                {
                    "name": REPLICA_DEPLOYMENT,
                    "num_replicas": replicas,
                    "user_config": msgspec.to_builtins(config or ReplicaConfig()),
                }
            ],
        }
        return name

    async def route(self, deployment: str) -> None:
        spec = RouteSpec(
            name=deployment,
            namespace="default",
            deployment=deployment,
            variants=[VariantRouteSpec(name="a", revisions={"r1": 100})],
            weights={"a": 100},
        )
        url = f"{self.registry}/v1/routes/default/{deployment}"
        status, content = await self.call("PUT", url, msgspec.json.encode(spec))
        assert status == 204, content

    async def state(self) -> RegistryState:
        status, content = await self.call("GET", f"{self.registry}/v1/state?timeout=0", limit_seconds=5)
        assert status == 200, content
        return msgspec.json.decode(content, type=RegistryState)

    async def replicas(self, deployment: str) -> list[Heartbeat]:
        return [b for b in (await self.state()).endpoints if b.model == deployment]

    async def ready(self, deployment: str, count: int, seconds: float = START_SECONDS) -> list[Heartbeat]:
        async def check() -> list[Heartbeat] | None:
            beats = await self.replicas(deployment)
            ready = [b for b in beats if b.state == "Ready"]
            return ready if len(ready) == len(beats) == count else None

        found: list[Heartbeat] = await until(check, f"{deployment} has {count} ready replicas", seconds)
        return found

    async def answers(self) -> bool:
        try:
            status, _ = await self.call("GET", self.registry + "/healthz", limit_seconds=2)
        except (aiohttp.ClientError, TimeoutError):
            return False
        return status == 200

    def processes(self, text: str) -> list[psutil.Process]:
        """Processes of this cluster whose command line holds a text."""
        found = []
        for process in psutil.process_iter():
            try:
                if text in " ".join(process.cmdline()) and self.owns(process):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def owns(self, process: psutil.Process) -> bool:
        environment = process.environ()
        own = str(self.ray.engine_logs)
        return environment.get("MODELFLEET_LOG_DIR") == own and process.status() != psutil.STATUS_ZOMBIE


class Follower:
    """A router as far as the registry can tell: it polls and keeps the table."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.update = TableUpdate(epoch="", version=0, full=True)
        self.history: list[set[str]] = []
        """Ready endpoints after each update."""
        self.epochs: list[str] = []
        self.models: dict[str, Any] = {}

    async def run(self) -> None:
        while True:
            url = f"{self.cluster.registry}/v1/table?epoch={self.update.epoch}&version={self.update.version}"
            try:
                status, content = await self.cluster.call(
                    "GET", f"{url}&timeout=5&router={self.name}", limit_seconds=15
                )
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.1)
                continue
            if status == 200:
                self.apply(msgspec.json.decode(content, type=TableUpdate))

    def apply(self, update: TableUpdate) -> None:
        self.update = update
        self.models = {} if update.full else {k: v for k, v in self.models.items() if k not in update.removed}
        self.models |= {m.name: m for m in update.models}
        if not self.epochs or self.epochs[-1] != update.epoch:
            self.epochs.append(update.epoch)
        self.history.append(self.ready())

    def ready(self) -> set[str]:
        return {
            e.id for m in self.models.values() for v in m.variants for e in v.endpoints if e.state == "Ready"
        }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """The cluster, with the registry serving."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = LocalRay(folder, print, cpus=8, gpus=0)
    with asyncio.Runner() as runner:
        runner.run(ray.start())
        try:
            cluster = Cluster(ray, port)
            runner.run(cluster.apply())
            runner.run(until(cluster.answers, "the registry answers", START_SECONDS))
            yield cluster
        finally:
            runner.run(ray.stop())
    left = cluster.processes("")
    assert not left, f"still running: {left}"
    assert not ray.temp_dir.exists()


@pytest.fixture
async def follower(cluster: Cluster) -> AsyncIterator[Follower]:
    following = Follower(cluster, f"router-{os.getpid()}")
    task = asyncio.create_task(following.run())
    yield following
    assert not task.done(), "the follower has failed"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
