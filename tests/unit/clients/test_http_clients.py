"""The control-plane clients against a real HTTP server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from modelfleet_operator.clients.errors import RefusedError, UnavailableError
from modelfleet_operator.clients.ray_serve import RayServeClient
from modelfleet_operator.clients.registry import RegistryClient
from modelfleet_serving.contract import RegistryState, RouteSpec, VariantRouteSpec

ROUTE = RouteSpec(
    name="m", namespace="n", deployment="d", variants=[VariantRouteSpec(name="a", revisions={"r": 100})]
)


class Server:
    """Answers what it is told to and keeps what it was sent."""

    def __init__(self) -> None:
        self.status = 200
        self.body: Any = {}
        self.seen: list[tuple[str, str, Any, str | None]] = []

    async def handle(self, request: web.Request) -> web.Response:
        content = await request.read()
        self.seen.append((request.method, request.path_qs, json.loads(content) if content else None,
                          request.headers.get("authorization")))  # fmt: skip
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        return web.Response(status=self.status, text=text)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str, aiohttp.ClientSession]]:
    state = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", state.handle)
    async with TestServer(app) as running, aiohttp.ClientSession() as session:
        yield state, str(running.make_url("")), session


async def test_registry_calls(server: tuple[Server, str, aiohttp.ClientSession]) -> None:
    state, url, session = server
    client = RegistryClient(session, url, lambda: "secret")
    await client.put_route(ROUTE)
    await client.delete_route("n", "d")
    await client.complete_routes()
    state.body = {"epoch": "e", "version": 3}
    assert await client.state("e", 2, 0) == RegistryState(epoch="e", version=3)
    state.status, state.body = 304, ""
    assert await client.state("e", 3, 0) is None
    methods = [(method, path.split("?")[0]) for method, path, _, _ in state.seen]
    assert methods == [
        ("PUT", "/v1/routes/n/d"),
        ("DELETE", "/v1/routes/n/d"),
        ("POST", "/v1/routes/complete"),
        ("GET", "/v1/state"),
        ("GET", "/v1/state"),
    ]
    assert state.seen[0][2]["variants"] == [{"name": "a", "revisions": {"r": 100}}]
    assert {token for *_, token in state.seen} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, UnavailableError), (429, UnavailableError), (409, RefusedError), (401, RefusedError)],
)
async def test_errors_say_what_and_never_the_token(
    server: tuple[Server, str, aiohttp.ClientSession], status: int, error: type[Exception]
) -> None:
    state, url, session = server
    state.status, state.body = status, "name is taken"
    client = RegistryClient(session, url, lambda: "secret")
    with pytest.raises(error, match=f"{status} name is taken") as caught:
        await client.put_route(ROUTE)
    assert "secret" not in str(caught.value)


async def test_nobody_there_is_unavailable() -> None:
    async with aiohttp.ClientSession() as session:
        client = RayServeClient(session, "http://127.0.0.1:9", lambda: None)
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
            await client.applications()


async def test_a_proxy_page_is_unavailable(server: tuple[Server, str, aiohttp.ClientSession]) -> None:
    state, url, session = server
    state.body = "<html>maintenance</html>"
    with pytest.raises(UnavailableError, match="answer not understood"):
        await RayServeClient(session, url, lambda: None).applications()


async def test_serve_details_are_read(server: tuple[Server, str, aiohttp.ClientSession]) -> None:
    state, url, session = server
    replicas = [{"state": "RUNNING", "replica_id": "x"}, {"state": "STARTING"}]
    replica = {"status": "UPDATING", "message": "no room", "replicas": replicas}
    state.body = {
        "controller_info": {},
        "applications": {
            "a": {
                "status": "DEPLOYING", "message": "", "deployed_app_config": {"name": "a", "args": {"x": 1}},
                "deployments": {"Replica": replica},
            },
            "b": {"status": "DELETING", "message": "", "deployed_app_config": None, "deployments": {}},
        },
    }  # fmt: skip
    found = await RayServeClient(session, url, lambda: None).applications()
    assert (found["a"].running_replicas, found["a"].total_replicas, found["a"].message) == (1, 2, "no room")
    assert found["b"].deleting


async def test_put_is_the_whole_set(server: tuple[Server, str, aiohttp.ClientSession]) -> None:
    state, url, session = server
    await RayServeClient(session, url, lambda: None).put([b'{"name":"a"}'])
    assert state.seen[0][2] == {"proxy_location": "Disabled", "applications": [{"name": "a"}]}


@pytest.mark.parametrize(
    ("status", "body"), [(200, {}), (200, "<html>login</html>"), (404, {"applications": {}}), (304, "")]
)
async def test_what_is_no_ray_is_not_an_empty_ray(
    server: tuple[Server, str, aiohttp.ClientSession], status: int, body: Any
) -> None:
    state, url, session = server
    state.status, state.body = status, body
    client = RayServeClient(session, url, lambda: None)
    with pytest.raises(UnavailableError):
        await client.applications()


async def test_a_put_that_nobody_took_is_told(server: tuple[Server, str, aiohttp.ClientSession]) -> None:
    state, url, session = server
    state.status = 404
    with pytest.raises(UnavailableError, match="404"):
        await RayServeClient(session, url, lambda: None).put([])
