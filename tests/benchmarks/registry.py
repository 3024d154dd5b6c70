"""The registry with thousands of replicas and many routers: ``python -m tests.benchmarks.registry``.

Replicas send heartbeats as often as the registry asks for; some change their state all the time, and every
router follows the table. Measured: the registry's share of a core, how long a heartbeat takes, and how long
it takes until every router has taken over a change.
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
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import psutil
from tests.benchmarks.common import Check, Report

from modelfleet_serving.contract import (
    EndpointState,
    EngineLoad,
    Heartbeat,
    HeartbeatReply,
    RouteSpec,
    TableUpdate,
    VariantRouteSpec,
)

REPLICAS_PER_MODEL = 10


class Replica:
    def __init__(self, bench: Bench, number: int) -> None:
        self.bench = bench
        self.number = number
        self.model = f"m{number // REPLICAS_PER_MODEL}"
        self.sequence = 0
        self.interval = 1.0

    async def run(self) -> None:
        await asyncio.sleep(self.number / self.bench.count)
        while True:
            await self.beat(EndpointState.READY)
            await asyncio.sleep(self.interval)

    async def beat(self, state: EndpointState) -> HeartbeatReply:
        self.sequence += 1
        body = Heartbeat(
            id=f"default.{self.model}.a.abcdef.{self.number:06x}",
            application=f"default.{self.model}.a.abcdef",
            model=self.model,
            url=f"http://10.0.{self.number // 250}.{self.number % 250}:30000",
            state=state,
            sequence=self.sequence,
            load=EngineLoad(running=self.sequence % 7, kv_cache_usage=0.5),
            node="10.0.0.1",
        )
        began = time.perf_counter()
        async with self.bench.session.post("/v1/heartbeat", data=msgspec.json.encode(body)) as answer:
            assert answer.status == 200, await answer.text()
            reply = msgspec.json.decode(await answer.read(), type=HeartbeatReply)
        self.bench.latencies.append(time.perf_counter() - began)
        self.interval = reply.interval_seconds
        return reply


class Bench:
    def __init__(self, session: aiohttp.ClientSession, count: int, routers: int) -> None:
        self.session = session
        self.count = count
        self.versions = [0] * routers
        self.moved = asyncio.Event()
        self.latencies: list[float] = []
        self.bytes = 0
        self.replicas = [Replica(self, number) for number in range(count)]

    async def follow(self, index: int) -> None:
        epoch = ""
        while True:
            query = {"epoch": epoch, "version": self.versions[index], "timeout": 25, "router": f"r{index}"}
            async with self.session.get("/v1/table", params=query) as answer:
                content = await answer.read()
            if answer.status == 200:
                self.bytes += len(content)
                update = msgspec.json.decode(content, type=TableUpdate)
                epoch, self.versions[index] = update.epoch, update.version
                self.moved.set()

    async def everywhere(self, version: int) -> None:
        while min(self.versions) < version:
            self.moved.clear()
            await self.moved.wait()

    async def put_routes(self) -> None:
        for model in sorted({replica.model for replica in self.replicas}):
            spec = RouteSpec(
                name=model,
                namespace="default",
                deployment=model,
                variants=[VariantRouteSpec(name="a", revisions={"abcdef": 100})],
                weights={"a": 100},
            )
            url = f"/v1/routes/default/{model}"
            async with self.session.put(url, data=msgspec.json.encode(spec)) as answer:
                assert answer.status == 204

    async def change(self, seconds: float) -> list[float]:
        """One replica after the other drains and comes back; how long until all routers know."""
        delays = []
        until = time.perf_counter() + seconds
        number = 0
        while time.perf_counter() < until:
            replica = self.replicas[number % self.count]
            number += 37
            for state in (EndpointState.DRAINING, EndpointState.READY):
                began = time.perf_counter()
                reply = await replica.beat(state)
                await asyncio.wait_for(self.everywhere(reply.table_version), 30)
                delays.append(time.perf_counter() - began)
            await asyncio.sleep(0.2)
        return delays


@contextlib.asynccontextmanager
async def registry() -> AsyncIterator[tuple[str, str, psutil.Process]]:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "token")
        file.write_text(token)  # noqa: ASYNC240  before anything is measured
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "modelfleet_serving.registry", "--listen", "127.0.0.1:0", "--token-file", str(file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        try:
            url = (await asyncio.wait_for(process.stdout.readline(), 30)).split()[1].decode()
            yield url, token, psutil.Process(process.pid)
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 15)


async def measure(count: int, routers: int, seconds: float, report: Report) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with registry() as (url, token, process):
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:
            bench = Bench(session, count, routers)
            tasks = [asyncio.create_task(replica.run()) for replica in bench.replicas]
            tasks += [asyncio.create_task(bench.follow(index)) for index in range(routers)]
            try:
                await bench.put_routes()
                await asyncio.wait_for(bench.everywhere(2), 120)  # warm
                await asyncio.sleep(5)
                bench.latencies.clear()
                cpu, began = sum(process.cpu_times()[:2]), time.perf_counter()
                delays = await bench.change(seconds)
                share = (sum(process.cpu_times()[:2]) - cpu) / (time.perf_counter() - began)
                rate = len(bench.latencies) / (time.perf_counter() - began)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            add(report, count, routers, share, rate, bench.latencies, delays, process.memory_info().rss)


def add(
    report: Report,
    count: int,
    routers: int,
    share: float,
    rate: float,
    latencies: list[float],
    delays: list[float],
    memory: int,
) -> None:
    slow = statistics.quantiles(latencies, n=100)[98]
    spread = statistics.median(delays)
    worst = statistics.quantiles(delays, n=100)[98]
    name = f"replicas_{count}"
    report.put(f"{name}.core_share", share)
    report.put(f"{name}.heartbeats_per_second", rate)
    report.put(f"{name}.heartbeat_p99_ms", slow * 1000)
    report.put(f"{name}.change_p50_ms", spread * 1000)
    report.put(f"{name}.change_p99_ms", worst * 1000)
    report.put(f"{name}.memory_mib", memory / 2**20)
    report.rows.append(
        (
            str(count),
            str(routers),
            f"{rate:.0f}",
            f"{share:.0%}",
            f"{slow * 1000:.1f}",
            f"{spread * 1000:.1f}",
            f"{worst * 1000:.1f}",
            f"{memory / 2**20:.0f}",
        )
    )
    if count >= 3000:
        report.checks.append(Check("registry share of a core", share, 0.5, at_most=True))
        report.checks.append(
            Check("a change at every router, p99", worst * 1000, 1000, at_most=True, unit="ms")
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.registry", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[10, 300, 3000])
    parser.add_argument("--routers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=15)
    options = parser.parse_args()
    columns = ("replicas", "routers", "heartbeats/s", "of a core", "heartbeat p99 ms", "change p50 ms",
               "change p99 ms", "RSS MiB")  # fmt: skip
    report = Report("registry", "Registry", columns)
    for count in options.replicas:
        asyncio.run(measure(count, options.routers, options.seconds, report))
    report.put("cpus", os.cpu_count() or 0)
    report.print()
    report.write()
    return 0 if all(check.met is not False for check in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
