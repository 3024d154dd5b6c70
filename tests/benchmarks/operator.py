"""The operator with a thousand ModelDeployments of three variants: cold sync, changes, memory, idle CPU.

Usage: python -m tests.benchmarks.operator [--deployments 1000] [--seconds 30] [--rate 10]

Real: etcd, kube-apiserver, the operator's process, the registry's process. A stand-in answers for Ray Serve
and sends the heartbeats of three thousand simulated replicas (Ray itself with so many applications is not the
operator's to measure, and would not fit on this machine). Latencies run from the API server's answer to the
write until Ray's stand-in has the new configuration, or a router's long poll the new weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.kube_config import load_kube_config
from tests.benchmarks.common import REPOSITORY, Check, Report, machine_lock
from tests.benchmarks.operator_sight import Cpu, Router, Statuses, api_writes
from tests.controlplane.bed import ControlPlane
from tests.controlplane.operator.processes import OperatorProcess, Process, RegistryProcess

from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, SECRET, SERVING_POOL, KubeClient
from modelfleet_operator.clients.processes import free_port

NAMESPACE = "bench"
MARGIN = 30.0
COLD_SECONDS = 300.0
QUIET_SECONDS = 15.0


def deployment(number: int, *, weight: int = 1, length: int = 4096) -> dict[str, Any]:
    """One of the thousand."""
    kinds = (("a", "A10"), ("b", "T4"), ("c", "A100-80G"))
    return {
        "metadata": {"name": f"m{number}", "namespace": NAMESPACE},
        "spec": {
            "model": {"source": "hf://bench/model"},
            "engine": {"type": "Simulator", "maxModelLen": length},
            "variants": [{"name": name, "accelerators": [{"type": kind}]} for name, kind in kinds],
            "routing": {"weights": {"a": weight, "b": 1, "c": 1}},
        },
    }


class Bench:
    """One run."""

    def __init__(
        self, options: argparse.Namespace, report: Report, directory: Path, plane: ControlPlane
    ) -> None:
        self.options, self.report, self.directory, self.plane = options, report, directory, plane
        self.peak = 0

    async def run(self) -> None:
        token = secrets.token_hex(16)
        registry = RegistryProcess(self.directory, token)
        ray_port = free_port()
        ray = Process(
            "ray",
            [sys.executable, "-m", "tests.controlplane.operator.standin", f"--port={ray_port}",
             f"--registry={registry.url}"],
            self.directory / "ray.log",
            {**os.environ, "STANDIN_TOKEN": token, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        self.ray = f"http://127.0.0.1:{ray_port}"
        configuration = Configuration()
        await load_kube_config(config_file=str(self.plane.kubeconfig()), client_configuration=configuration)
        configuration.connection_pool_maxsize = 32
        headers = {"authorization": f"Bearer {token}"}
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(registry)
            stack.enter_context(ray)
            api = await stack.enter_async_context(ApiClient(configuration))
            self.session = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))
            self.kube = KubeClient(api, timeout=60, manager="bench")
            registry.wait_ready()
            self.registry = registry.url
            await self._fill(token)
            self.router = Router(self.session, registry.url)
            self.statuses = Statuses(api, NAMESPACE)
            operator = OperatorProcess(
                self.plane.kubeconfig(), self.directory / "operator.log", WATCH_NAMESPACES=NAMESPACE
            )
            tasks = [asyncio.create_task(work) for work in (self.router.follow(), self.statuses.follow())]
            stack.enter_context(operator)
            tasks.append(asyncio.create_task(self._watch_memory(operator)))
            pids = {**self.plane.pids, "operator": operator.pid, "registry": registry.pid,
                    "Ray's stand-in": ray.pid, "this benchmark": os.getpid()}  # fmt: skip
            self.cpu = Cpu(pids)
            try:
                await self._cold()
                await self._changes()
                await self._idle(operator)
            except TimeoutError:
                sys.stderr.write(operator.text()[-3000:])
                raise
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        self.report.put("memory.peak_mb", self.peak / 1e6)

    async def _fill(self, token: str) -> None:
        self.plane.kubectl("create", "namespace", NAMESPACE)
        await self.kube.apply(
            SECRET, {"metadata": {"name": "t", "namespace": NAMESPACE}, "stringData": {"token": token}}
        )
        groups = [{"type": kind, "gpusPerNode": 8, "maxNodes": 1000} for kind in ("A10", "T4", "A100-80G")]
        ray = {"address": self.ray, "registry": self.registry, "authToken": {"name": "t", "key": "token"}}
        pool = {"metadata": {"name": "default", "namespace": NAMESPACE}}
        await self.kube.apply(SERVING_POOL, {**pool, "spec": {"ray": ray, "accelerators": groups}})
        numbers = range(self.options.deployments)
        await _at_once(numbers, lambda n: self.kube.apply(MODEL_DEPLOYMENT, deployment(n)))

    async def _watch_memory(self, operator: OperatorProcess) -> None:
        process = psutil.Process(operator.pid)
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            await asyncio.sleep(0.2)

    async def _set_at(self) -> dict[str, float]:
        async with self.session.get(f"{self.ray}/standin") as answer:
            body = await answer.json()
            self.counts = {k: body[k] for k in ("puts", "gets", "restarted")}
            found: dict[str, float] = body["setAt"]
            return found

    async def _cold(self) -> None:
        began = time.time()
        wanted: int = self.options.deployments
        writes = self._writes()

        async def until(what: str, holds: Callable[[], Awaitable[bool]]) -> float:
            while not await holds():
                if time.time() > began + COLD_SECONDS:
                    raise TimeoutError(what)
                await asyncio.sleep(0.1)
            return time.time() - began

        async def in_ray() -> bool:
            return len(await self._set_at()) >= wanted * 3

        async def in_table() -> bool:
            return len(self.router.models) >= wanted

        async def all_ready() -> bool:
            return len(self.statuses.ready) >= wanted

        applications = await until("applications", in_ray)
        table = await until("routes", in_table)
        ready = await until("statuses", all_ready)
        self.report.put("cold.applications_s", applications)
        self.report.put("cold.routes_s", table)
        self.report.put("cold.ready_s", ready)
        self.report.rows += [
            ("cold sync", "all applications in Ray", f"{applications:.1f} s"),
            ("", "all routes at a router", f"{table:.1f} s"),
            ("", "all statuses Ready=True", f"{ready:.1f} s"),
        ]
        self._who_worked("cold", self._writes() - writes)
        self.report.checks.append(Check("cold sync", ready, 60, at_most=True, unit="s"))

    def _writes(self) -> Counter[str]:
        return api_writes(self.plane.kubectl("get", "--raw", "/metrics"))

    def _who_worked(self, phase: str, writes: Mapping[str, int]) -> None:
        """Tell what the phase cost whom: that is what bounds it."""
        seconds, used = self.cpu.lap()
        share = {name: value / seconds for name, value in used.items()}
        for name, value in share.items():
            self.report.put(f"{phase}.cpu.{name.replace(' ', '_')}", value)
        for name, count in writes.items():
            self.report.put(f"{phase}.writes.{name}", count)
        most = sorted(share.items(), key=lambda item: -item[1])[:5]
        text = ", ".join(f"{name} {value:.0%}" for name, value in most)
        self.report.rows.append(("", f"cores used ({sum(share.values()):.1f} of {os.cpu_count()})", text))
        text = ", ".join(f"{count} {name}" for name, count in sorted(writes.items()) if count)
        self.report.rows.append(("", "writes to the API server", text))

    async def _changes(self) -> None:
        total = int(self.options.rate * self.options.seconds)
        wrote: list[tuple[int, int, float]] = []
        pending: set[asyncio.Task[None]] = set()
        await self._settled()
        writes = self._writes()
        self.cpu.lap()
        began = time.time()

        async def change(number: int, at: int) -> None:
            engine = at % 2 == 0
            body = deployment(number, length=5000 + at) if engine else deployment(number, weight=2 + at)
            await self.kube.apply(MODEL_DEPLOYMENT, body)
            wrote.append((number, at, time.time()))

        for at in range(total):
            await asyncio.sleep(max(0.0, began + at / self.options.rate - time.time()))
            task = asyncio.create_task(change(at % self.options.deployments, at))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
        ray, table = await self._latencies(wrote)
        for name, label, values in (("ray", "change to Ray", ray), ("router", "change to a router", table)):
            values.sort()
            p99 = values[min(len(values) - 1, int(len(values) * 0.99))] if values else float("inf")
            p50 = statistics.median(values) if values else float("inf")
            self.report.put(f"change.{name}_p50_s", p50)
            self.report.put(f"change.{name}_p99_s", p99)
            self.report.put(f"change.{name}_count", len(values))
            self.report.rows.append((label, f"p50 / p99 of {len(values)}", f"{p50:.2f} / {p99:.2f} s"))
            self.report.checks.append(Check(f"{label} p99", p99, 2, at_most=True, unit="s"))
        self._who_worked("change", self._writes() - writes)

    async def _settled(self) -> None:
        """Wait until nothing is rolled out any more, and the last Events of it have been written."""
        deadline = time.time() + 60
        while len(self.statuses.ready) < self.options.deployments and time.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await asyncio.sleep(QUIET_SECONDS)

    async def _latencies(self, wrote: list[tuple[int, int, float]]) -> tuple[list[float], list[float]]:
        """Seconds from the API server's answer to each write until it was where it belongs."""
        deadline = time.time() + MARGIN
        while True:
            set_at = [(name.split(".")[1], at) for name, at in (await self._set_at()).items()]
            ray, table = [], []
            for number, at, written in wrote:
                model = f"m{number}"
                if at % 2:
                    if routed := self.router.weights.get((model, 2 + at)):
                        table.append(max(routed - written, 0.0))
                    continue
                # The news may come before the answer to the write does; all three variants count.
                since = sorted(when for name, when in set_at if name == model and when > written - 0.2)
                if len(since) >= 3:
                    ray.append(max(since[2] - written, 0.0))
            missing = len(wrote) - len(ray) - len(table)
            if not missing or time.time() > deadline:
                self.report.put("change.missing", missing)
                self.report.checks.append(Check("changes lost", missing, 0, at_most=True))
                return ray, table
            await asyncio.sleep(0.5)

    async def _idle(self, operator: OperatorProcess) -> None:
        await self._settled()
        process = psutil.Process(operator.pid)
        before, began = process.cpu_times(), time.monotonic()
        await asyncio.sleep(self.options.idle)
        times = process.cpu_times()
        share = (times.user + times.system - before.user - before.system) / (time.monotonic() - began) * 100
        await self._set_at()
        self.report.put("idle.cpu_percent", share)
        self.report.put("memory.settled_mb", process.memory_info().rss / 1e6)
        self.report.put("ray.puts", self.counts["puts"])
        self.report.put("ray.gets", self.counts["gets"])
        self.report.put("ray.restarted", self.counts["restarted"])
        self.report.rows += [
            ("idle", f"CPU over {self.options.idle:g} s, heartbeats coming in", f"{share:.2f} % of a core"),
            ("memory", "resident, peak", f"{self.peak / 1e6:.0f} MB"),
            ("", "resident, settled", f"{process.memory_info().rss / 1e6:.0f} MB"),
            ("Ray", "PUTs / GETs of the whole set", f"{self.counts['puts']} / {self.counts['gets']}"),
        ]
        self.report.checks += [
            Check("idle CPU", share, 3, at_most=True, unit="% of a core"),
            Check("resident memory", self.peak / 1e6, 400, at_most=True, unit="MB"),
            Check("restarted engines", self.counts["restarted"], 0, at_most=True),
        ]


async def _at_once(numbers: Iterable[int], work: Callable[[int], Awaitable[Any]]) -> None:
    limit = asyncio.Semaphore(16)

    async def one(number: int) -> None:
        async with limit:
            await work(number)

    await asyncio.gather(*map(one, numbers))


def main() -> int:
    """Entry point; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deployments", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--idle", type=float, default=30)
    parser.add_argument("--lock", type=Path, help="lock file to hold while measuring")
    options = parser.parse_args()
    title = f"Operator: {options.deployments} ModelDeployments of 3 variants"
    report = Report("operator", title, ("phase", "what", "measured"))
    report.put("deployments", options.deployments)
    with machine_lock(options.lock), tempfile.TemporaryDirectory() as directory, ControlPlane() as plane:
        plane.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "manifests" / "crds"))
        plane.wait_for_crd("modeldeployments.modelfleet.io", "servingpools.modelfleet.io")
        asyncio.run(Bench(options, report, Path(directory), plane).run())
    report.notes += [
        "What bounds it: the CPU that all share, see above. A cold sync is two writes to the API server for",
        "each ModelDeployment (finalizer, status) and an Event. A change of an engine waits for the PUT that",
        "is under way, as each PUT and the GET before it say all applications; a changed weight does not.",
        "Ray is a stand-in: a real one's own work comes on top.",
    ]
    report.print()
    print(report.write())
    return 0 if all(check.met is not False for check in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
