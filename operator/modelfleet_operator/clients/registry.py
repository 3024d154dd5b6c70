"""Client of the registry: routes in, observed endpoints and demand out."""

from __future__ import annotations

from urllib.parse import quote

import msgspec

from modelfleet_operator.clients.http import JsonClient
from modelfleet_serving.contract import RegistryState, RouteSpec

_SLACK_SECONDS = 10.0


class RegistryClient(JsonClient):
    """Calls one registry; see :mod:`modelfleet_serving.contract` for the interface."""

    async def state(self, epoch: str = "", version: int = -1, wait: float = 0.0) -> RegistryState | None:
        """What the registry knows, or ``None`` when nothing changed within ``wait`` seconds.

        Raises:
            UnavailableError: the registry does not answer.
        """
        query = {"epoch": epoch, "version": str(version), "timeout": f"{wait:g}"}
        status, content = await self.call(
            "GET", "/v1/state", query=query, limit_seconds=wait + _SLACK_SECONDS
        )
        if status == 304:
            return None
        state: RegistryState = self.decode(content, RegistryState)
        return state

    async def put_route(self, route: RouteSpec) -> None:
        """Set the route of one ModelDeployment.

        Raises:
            RefusedError: the model's or an adapter's name belongs to another ModelDeployment.
            UnavailableError: the registry does not answer.
        """
        path = f"/v1/routes/{quote(route.namespace)}/{quote(route.deployment)}"
        await self.call("PUT", path, body=msgspec.json.encode(route))

    async def delete_route(self, namespace: str, deployment: str) -> None:
        """Withdraw a route; none there is fine.

        Raises:
            UnavailableError: the registry does not answer.
        """
        await self.call("DELETE", f"/v1/routes/{quote(namespace)}/{quote(deployment)}")

    async def complete_routes(self) -> None:
        """Say that there are no further routes: without any, a young registry waits for the first.

        Raises:
            UnavailableError: the registry does not answer.
        """
        await self.call("POST", "/v1/routes/complete")
