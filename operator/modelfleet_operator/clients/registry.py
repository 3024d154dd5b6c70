"""Client of the registry: routes in, observed endpoints and demand out."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import aiohttp
import msgspec

from modelfleet_operator.clients.errors import RefusedError
from modelfleet_operator.clients.http import JsonClient
from modelfleet_serving.contract import HEADER_TERM, RegistryState, RouteSpec

_SLACK_SECONDS = 10.0
_PRECONDITION_FAILED = 412


class SupersededError(RefusedError):
    """Another leader has taken over: this one may write nothing."""


class RegistryClient(JsonClient):
    """Calls one registry; see :mod:`modelfleet_serving.contract` for the interface.

    Args:
        session: shared connection pool; its owner closes it.
        address: base URL.
        token: gives the bearer token at each call.
        term: gives the number of the leadership that is spoken for, where leaders are elected.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        address: str,
        token: Callable[[], str | None],
        term: Callable[[], int | None] = lambda: None,
    ) -> None:
        super().__init__(session, address, token)
        self._term = term

    async def state(self, epoch: str = "", version: int = -1, wait: float = 0.0) -> RegistryState | None:
        """What the registry knows, or ``None`` when nothing changed within ``wait`` seconds.

        Raises:
            UnavailableError: the registry does not answer.
        """
        query = {"epoch": epoch, "version": str(version), "timeout": f"{wait:g}"}
        status, content = await self.call(
            "GET", "/v1/state", query=query, extra=self._headers(), limit_seconds=wait + _SLACK_SECONDS
        )
        if status == 304:
            return None
        state: RegistryState = self.decode(content, RegistryState)
        return state

    async def put_route(self, route: RouteSpec) -> None:
        """Set the route of one ModelDeployment.

        Raises:
            SupersededError: another leader has taken over.
            RefusedError: the model's or an adapter's name belongs to another ModelDeployment.
            UnavailableError: the registry does not answer.
        """
        path = f"/v1/routes/{quote(route.namespace)}/{quote(route.deployment)}"
        await self._write("PUT", path, msgspec.json.encode(route))

    async def delete_route(self, namespace: str, deployment: str) -> None:
        """Withdraw a route; none there is fine.

        Raises:
            SupersededError: another leader has taken over.
            UnavailableError: the registry does not answer.
        """
        await self._write("DELETE", f"/v1/routes/{quote(namespace)}/{quote(deployment)}")

    async def complete_routes(self) -> None:
        """Say that there are no further routes: without any, a young registry waits for the first.

        Raises:
            SupersededError: another leader has taken over.
            UnavailableError: the registry does not answer.
        """
        await self._write("POST", "/v1/routes/complete")

    async def _write(self, method: str, path: str, body: bytes | None = None) -> None:
        try:
            await self.call(method, path, body=body, extra=self._headers())
        except RefusedError as error:
            if error.status == _PRECONDITION_FAILED:
                raise SupersededError(str(error), error.status) from error
            raise

    def _headers(self) -> dict[str, str]:
        term = self._term()
        return {} if term is None else {HEADER_TERM: str(term)}
