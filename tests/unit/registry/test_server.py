"""The registry over HTTP."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
from tests.unit.registry.build import beat, route, until

from modelfleet_serving.contract import (
    DemandReport,
    EndpointState,
    HeartbeatReply,
    ModelDemand,
    RegistryState,
    TableUpdate,
)
from modelfleet_serving.registry.server import MAX_BODY_BYTES, PortTakenError, RegistryServer
from modelfleet_serving.registry.state import Settings

TOKEN = "a-token"


class Api:
    def __init__(self, server: RegistryServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session
        self.url = f"http://127.0.0.1:{server.port}"

    async def call(self, method: str, path: str, body: Any = None, token: str = TOKEN) -> tuple[int, bytes]:
        content = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
        data = None if content is None else io.BytesIO(content)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        async with self.session.request(method, self.url + path, data=data, headers=headers) as answer:
            return answer.status, await answer.read()

    async def table(
        self, epoch: str = "", version: int = 0, wait: float = 5, router: str = "r"
    ) -> TableUpdate | None:
        query = f"epoch={epoch}&version={version}&timeout={wait}&router={router}"
        status, content = await self.call("GET", f"/v1/table?{query}")
        assert status in (200, 304), content
        return msgspec.json.decode(content, type=TableUpdate) if status == 200 else None

    async def state(self, epoch: str = "", version: int = -1, wait: float = 0) -> RegistryState | None:
        status, content = await self.call("GET", f"/v1/state?epoch={epoch}&version={version}&timeout={wait}")
        assert status in (200, 304), content
        return msgspec.json.decode(content, type=RegistryState) if status == 200 else None

    async def beat(self, name: str, sequence: int, **fields: Any) -> HeartbeatReply:
        status, content = await self.call("POST", "/v1/heartbeat", beat(name, sequence, **fields))
        assert status == 200, content
        return msgspec.json.decode(content, type=HeartbeatReply)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    server = RegistryServer(TOKEN, Settings(settle=0.0))
    async with server.running("127.0.0.1", 0), aiohttp.ClientSession() as session:
        yield Api(server, session)


async def test_a_router_follows_from_an_empty_table(api: Api) -> None:
    waiting = asyncio.create_task(api.table())
    assert (await api.call("PUT", "/v1/routes/default/m", route()))[0] == 204
    first = await waiting
    assert first is not None
    assert (first.full, [m.name for m in first.models]) == (True, ["m"])
    following = asyncio.create_task(api.table(first.epoch, first.version))
    reply = await api.beat("x", 1)
    second = await following
    assert second is not None
    assert (second.full, second.version) == (False, reply.table_version)
    assert [e.id for e in second.models[0].variants[0].endpoints] == ["x"]
    assert await api.table(second.epoch, second.version, wait=0.05) is None
    assert (await api.table("another epoch", 99)).full  # type: ignore[union-attr]


async def test_a_poll_confirms_what_the_router_has(api: Api) -> None:
    await api.call("PUT", "/v1/routes/default/m", route())
    first = await api.table()
    assert first is not None
    polling = asyncio.create_task(api.table(first.epoch, first.version))
    await until(lambda: api.server.registry.confirmed(0.0))
    reply = await api.beat("x", 1)
    assert reply.confirmed_version < reply.table_version
    update = await polling
    assert update is not None
    polling = asyncio.create_task(api.table(update.epoch, update.version))
    await until(lambda: api.server.registry.confirmed(0.0) == reply.table_version)
    assert (await api.beat("x", 2)).confirmed_version == reply.table_version
    polling.cancel()


async def test_a_router_that_breaks_off_is_noticed(api: Api) -> None:
    await api.call("PUT", "/v1/routes/default/m", route())
    first = await api.table()
    assert first is not None
    polling = asyncio.create_task(api.table(first.epoch, first.version, wait=60))
    router = api.server.registry._routers["r"]
    await until(lambda: router.polls)
    polling.cancel()
    await until(lambda: not router.polls)


async def test_the_operator_is_woken(api: Api) -> None:
    seen = await api.state()
    assert seen is not None
    waiting = asyncio.create_task(api.state(seen.epoch, seen.version, wait=10))
    await api.call("PUT", "/v1/routes/default/m", route())
    seen = await waiting
    assert seen is not None
    assert seen.routes == {"default/m": route().digest()}
    while seen.warming:
        seen = await api.state(seen.epoch, seen.version, wait=10)
        assert seen is not None
    waiting = asyncio.create_task(api.state(seen.epoch, seen.version, wait=10))
    report = DemandReport(router="r", models=[ModelDemand(model="m", queued=1)])
    assert (await api.call("POST", "/v1/demand", report))[0] == 200
    seen = await waiting
    assert seen is not None
    assert [(d.model, d.queued) for d in seen.demand] == [("m", 1)]
    assert [r.id for r in seen.routers] == ["r"]


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", "ü"])
@pytest.mark.parametrize("path", ["/v1/state", "/v1/table", "/metrics", "/nothing"])
async def test_nothing_without_the_token(api: Api, token: str, path: str) -> None:
    status, content = await api.call("GET", path, token=token)
    assert status == 401
    assert TOKEN.encode() not in content


async def test_health_needs_no_token(api: Api) -> None:
    assert (await api.call("GET", "/healthz", token=""))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/heartbeat", b"{", 400, "truncated"),
        ("POST", "/v1/heartbeat", b"{}", 400, "`id`"),
        ("POST", "/v1/heartbeat", beat("x", 1, application="other"), 400, "'other' is not the name"),
        ("POST", "/v1/heartbeat", beat("", 1), 400, "an id must be"),
        ("POST", "/v1/heartbeat", b" " * (MAX_BODY_BYTES + 1), 413, "Large"),
        ("PUT", "/v1/routes/default/n", route("m"), 400, "put at default/n"),
        ("PUT", "/v1/routes/default/m", route("m", weights={"zzz": 1}), 400, "zzz"),
        ("GET", "/v1/table?timeout=-1", None, 400, "between 0 and 60"),
        ("GET", "/v1/table?timeout=nan", None, 400, "between 0 and 60"),
        ("GET", "/v1/table?version=x", None, 400, "must be numbers"),
        ("GET", "/v1/heartbeat", None, 405, "Not Allowed"),
        ("GET", "/", None, 404, "Not Found"),
    ],
)
async def test_bad_calls_are_explained(
    api: Api, method: str, path: str, body: Any, status: int, message: str
) -> None:
    got, content = await api.call(method, path, body)
    assert (got, message in msgspec.json.decode(content)["error"]) == (status, True), content


async def test_a_conflict_names_the_owner(api: Api) -> None:
    await api.call("PUT", "/v1/routes/default/m", route())
    status, content = await api.call("PUT", "/v1/routes/default/n", route("n", name="m"))
    assert (status, b"default/m" in content) == (409, True)
    assert (await api.call("DELETE", "/v1/routes/default/m"))[0] == 204
    assert (await api.call("PUT", "/v1/routes/default/n", route("n", name="m")))[0] == 204


async def test_metrics(api: Api) -> None:
    await api.call("PUT", "/v1/routes/default/m", route())
    await api.beat("x", 1, state=EndpointState.DRAINING)
    _, content = await api.call("GET", "/metrics")
    text = content.decode()
    assert 'modelfleet_registry_replicas{state="Draining"} 1.0' in text
    assert "modelfleet_registry_heartbeats_total 1.0" in text
    assert 'modelfleet_registry_engine_restarts_total{model="m",variant="a"} 0.0' in text
    assert 'modelfleet_registry_replicas_lost_total{model="m",variant="a"} 0.0' in text
    assert 'path="/v1/routes/{namespace}/{name}"' in text, "no label per model"


async def test_a_successor_takes_the_port_over() -> None:
    old, new = RegistryServer(TOKEN), RegistryServer(TOKEN)
    async with aiohttp.ClientSession() as session, old.running("127.0.0.1", 0):
        with pytest.raises(PortTakenError):
            async with new.running("127.0.0.1", old.port):
                pass
        stop = asyncio.Event()

        async def succeed() -> None:
            async with new.running("127.0.0.1", old.port, bind_seconds=10):
                await stop.wait()

        succeeding = asyncio.create_task(succeed())
        poll = asyncio.create_task(Api(old, session).table(wait=30))
        await until(lambda: old._polls)
    assert await poll is None, "a poll is answered when the registry ends"
    await until(lambda: new.port)
    async with aiohttp.ClientSession() as session:
        assert (await Api(new, session).call("GET", "/healthz"))[0] == 200
    stop.set()
    await succeeding


async def test_a_crowd_of_changes_is_told_in_few_answers(api: Api) -> None:
    await api.call("PUT", "/v1/routes/default/m", route())
    update = await api.table()
    assert update is not None
    sending = asyncio.gather(*(api.beat(f"x{n}", 1) for n in range(100)))
    answers = 0
    while True:
        more = await api.table(update.epoch, update.version, wait=0.3)
        if more is None:
            break
        update, answers = more, answers + 1
    await sending
    assert len(update.models[0].variants[0].endpoints) == 100
    assert answers < 50


def test_the_token_is_found_where_ray_looks(tmp_path: Any) -> None:
    from modelfleet_serving.ray_token import TokenError, load_token

    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    env = {"HOME": str(tmp_path)}
    assert load_token(env) is None
    default.write_text("from-home\n")
    assert load_token(env) == "from-home"
    other = tmp_path / "token"
    env["RAY_AUTH_TOKEN_PATH"] = str(other)
    with pytest.raises(TokenError, match="No such file"):
        load_token(env)
    other.write_text(" \n")
    with pytest.raises(TokenError, match="is empty"):
        load_token(env)
    other.write_text("from-path\n")
    assert load_token(env) == "from-path"
    env["RAY_AUTH_TOKEN"] = " from-env "
    assert load_token(env) == "from-env"
