"""What the operator's benchmark sees: when a router, Ray and a user had which state, and who used the CPU."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec
import psutil
from kubernetes.aio.client.api.custom_objects_api import CustomObjectsApi
from kubernetes.aio.client.api_client import ApiClient
from prometheus_client.parser import text_string_to_metric_families

from modelfleet_operator.api import GROUP, VERSION
from modelfleet_serving.contract import TableUpdate

_WRITES: Final = frozenset({"APPLY", "PATCH", "POST", "PUT"})
_RESOURCES: Final = frozenset({"modeldeployments", "servingpools", "events"})


@dataclass
class Router:
    """A long poll of the route table, as a router does it.

    Attributes:
        weights: when a model's variant "a" had which weight first, by the machine's clock.
        models: models in the table.
    """

    session: aiohttp.ClientSession
    registry: str
    weights: dict[tuple[str, int], float] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)

    async def follow(self) -> None:
        """Poll until cancelled."""
        epoch, version = "", -1
        while True:
            query = {"epoch": epoch, "version": str(version), "timeout": "20", "router": "bench"}
            try:
                async with self.session.get(f"{self.registry}/v1/table", params=query) as answer:
                    if answer.status != 200:
                        await asyncio.sleep(0.05)
                        continue
                    update = msgspec.json.decode(await answer.read(), type=TableUpdate)
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.1)
                continue
            epoch, version, now = update.epoch, update.version, time.time()
            for model in update.models:
                self.models.add(model.name)
                self.weights.setdefault((model.name, model.weights.get("a", 0)), now)


@dataclass
class Statuses:
    """A watch of the ModelDeployments, as ``kubectl get mdep -w`` does it: a list would be work of its own.

    Attributes:
        ready: names whose status says ``Ready=True`` for the newest generation.
    """

    api: ApiClient
    namespace: str
    ready: set[str] = field(default_factory=set)

    async def follow(self) -> None:
        """Watch until cancelled."""
        calls = CustomObjectsApi(self.api)
        where = (GROUP, VERSION, self.namespace, "modeldeployments")
        version = "0"
        while True:
            answer = await calls.list_namespaced_custom_object_without_preload_content(
                *where, watch=True, resource_version=version, timeout_seconds=300, _request_timeout=310
            )
            async with answer:
                buffer = b""
                async for chunk in answer.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        event = msgspec.json.decode(line)
                        if event["type"] == "ERROR":
                            raise RuntimeError(event["object"].get("message"))
                        version = event["object"]["metadata"]["resourceVersion"]
                        self._take(event["object"])

    def _take(self, body: dict[str, Any]) -> None:
        metadata, status = body["metadata"], body.get("status", {})
        true = {c["type"] for c in status.get("conditions", ()) if c["status"] == "True"}
        now = "Ready" in true and status.get("observedGeneration") == metadata["generation"]
        (self.ready.add if now else self.ready.discard)(metadata["name"])


class Cpu:
    """CPU time of processes, phase by phase.

    Args:
        pids: by what people call the process.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._before = self._now()
        self._began = time.monotonic()

    def _now(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: t.user + t.system for name, t in times.items()}

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, and CPU seconds that each process used in it."""
        now, at = self._now(), time.monotonic()
        used = {name: now[name] - self._before[name] for name in now}
        seconds, self._before, self._began = at - self._began, now, at
        return seconds, used


def api_writes(exposition: str) -> Counter[str]:
    """Writes that the API server has answered so far, by resource.

    Args:
        exposition: its ``/metrics``.
    """
    text = "\n".join(line for line in exposition.splitlines() if line.startswith("apiserver_request_total{"))
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if labels["verb"] in _WRITES and labels["resource"] in _RESOURCES:
                name = "/".join(filter(None, (labels["resource"], labels["subresource"])))
                counts[name] += int(sample.value)
    return counts
