"""Two router processes and a real registry: what one grants, the other knows of."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.registry.build import beat, route
from tests.unit.router.harness import Engine, answer_json, hang, post, until
from tests.unit.router.test_process import Router, engine, run

from modelfleet_serving.contract import DemandReply, DemandReport
from modelfleet_serving.registry.server import RegistryServer
from modelfleet_serving.registry.state import Settings
from modelfleet_serving.router.tenants import generate_key, hash_key

pytestmark = pytest.mark.timeout(60)


class Fleet:
    """Two routers with one model on one engine, and what they told the registry."""

    def __init__(self, server: RegistryServer) -> None:
        self.server = server
        self.engine: Engine
        self.routers: list[Router] = []
        self.reports: list[DemandReport] = []
        self._take = server.registry.demand
        server.registry.demand = self._note  # type: ignore[method-assign]

    def _note(self, report: DemandReport, now: float) -> DemandReply:
        self.reports.append(report)
        return self._take(report, now)

    async def told(self) -> None:
        """Each router has reported what was before, and has been answered after that."""
        seen = len(self.reports)

        def twice() -> bool:  # the second report is sent after the answer to the first
            return all([r.router for r in self.reports[seen:]].count(name) >= 2 for name in ("one", "two"))

        await until(twice)


@contextlib.asynccontextmanager
async def fleet(directory: Path, keys: Path) -> AsyncIterator[Fleet]:
    server = RegistryServer(token=None, settings=Settings(settle=0.0, lease=120.0, router_lease=3.0))
    found = Fleet(server)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(server.running("127.0.0.1", 0))
        found.engine = await stack.enter_async_context(engine(handler=answer_json))
        server.registry.put_route(route(), server._clock())
        server.registry.heartbeat(beat("r1", 1, url=found.engine.url), server._clock())
        starting = []
        for name in ("one", "two"):
            (directory / name).mkdir()
            arguments = ("--registry", f"http://127.0.0.1:{server.port}", "--router-id", name)
            arguments += ("--tenants", str(keys), "--workers", "2" if name == "one" else "1")
            starting.append(stack.enter_async_context(run(directory / name, *arguments)))
        found.routers = list(await asyncio.gather(*starting))
        await found.told()
        yield found


def _keys(path: Path, **tenants: dict[str, int]) -> list[dict[str, str]]:
    """Writes keys of tenants with limits; the header of each."""
    keys = {name: generate_key() for name in tenants}
    entries = [{"name": name, "hash": hash_key(key), **tenants[name]} for name, key in keys.items()]
    path.write_text(json.dumps({"keys": entries}))
    return [{"authorization": f"Bearer {key}"} for key in keys.values()]


async def test_limits_hold_for_all_routers_together(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    rated, few = _keys(file, rated={"requestsPerMinute": 20}, few={"concurrency": 2})
    async with fleet(tmp_path, file) as found:
        one, two = found.routers
        for _ in range(15):
            answer = await one.ask(post(model="m", headers=rated))
            assert answer.status == 200, answer.body
        found.engine.handler = hang
        clients = [await one.client() for _ in range(2)]
        for client in clients:
            client.send(post(model="m", headers=few))
        await until(lambda: len(found.engine.requests) >= 17)
        await found.told()

        found.engine.handler = answer_json
        refused = await two.ask(post(model="m", headers=few))
        assert refused.status == 429
        assert "2 requests running" in refused.body.decode()
        statuses = [(await two.ask(post(model="m", headers=rated))).status for _ in range(15)]
        # Its own twenty would not be used up; a few came back meanwhile.
        assert 5 <= statuses.count(200) <= 12, statuses
        assert statuses[-1] == 429

        for client in clients:
            await client.close()
        await found.told()
        assert (await two.ask(post(model="m", headers=few))).status == 200

        registry, clock = found.server.registry, found.server._clock
        assert registry.demand(DemandReport(router="one"), clock()).routers == 2
        os.kill(two.process.pid, signal.SIGKILL)
        await until(lambda: registry.demand(DemandReport(router="one"), clock()).routers == 1)
