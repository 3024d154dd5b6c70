"""Client of Ray Serve's REST API (``/api/serve/applications/`` of the Ray dashboard).

``PUT`` is declarative for the whole set of applications: what is left out is removed. Applications of
other owners are therefore put back as Ray itself reports them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from modelfleet_operator.clients.http import JsonClient
from modelfleet_operator.reconcile.applications import ApplicationState

_PATH = "/api/serve/applications/"


class _Replica(msgspec.Struct):
    state: str = ""


class _Deployment(msgspec.Struct):
    status: str = ""
    message: str = ""
    replicas: list[_Replica] = []


class _Application(msgspec.Struct):
    status: str = ""
    message: str = ""
    deployed_app_config: dict[str, Any] | None = None
    deployments: dict[str, _Deployment] = {}


class _ServeDetails(msgspec.Struct):
    applications: dict[str, _Application] = {}


class RayServeClient(JsonClient):
    """Calls the dashboard of one Ray cluster."""

    async def applications(self) -> dict[str, ApplicationState]:
        """The applications that Serve knows, by name.

        Raises:
            UnavailableError: the dashboard does not answer.
            RefusedError: the token is wrong.
        """
        _, content = await self.call("GET", _PATH)
        details: _ServeDetails = self.decode(content, _ServeDetails)
        return {name: _state(name, app) for name, app in details.applications.items()}

    async def put(self, configs: list[dict[str, Any]]) -> None:
        """Make Serve run exactly these applications.

        Raises:
            UnavailableError: the dashboard does not answer.
            RefusedError: Serve does not accept the configuration.
        """
        body = msgspec.json.encode({"proxy_location": "Disabled", "applications": configs})
        await self.call("PUT", _PATH, body=body, limit_seconds=60)


def _state(name: str, app: _Application) -> ApplicationState:
    messages = [app.message, *(d.message for d in app.deployments.values())]
    replicas = [r for d in app.deployments.values() for r in d.replicas]
    return ApplicationState(
        name=name,
        status=app.status,
        message="; ".join(dict.fromkeys(m.strip() for m in messages if m.strip())),
        config=app.deployed_app_config or {},
        running_replicas=sum(r.state == "RUNNING" for r in replicas),
        total_replicas=len(replicas),
    )
