"""Client of Ray Serve's REST API (``/api/serve/applications/`` of the Ray dashboard).

``PUT`` is declarative for the whole set of applications: what is left out is removed. Applications of
other owners are therefore put back as Ray itself reports them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from modelfleet_operator.clients.errors import UnavailableError
from modelfleet_operator.clients.http import JsonClient
from modelfleet_operator.reconcile.applications import ApplicationState

PUT_SECONDS: Final = 60.0
_PATH: Final = "/api/serve/applications/"


class _Replica(msgspec.Struct):
    state: str = ""


class _Deployment(msgspec.Struct):
    status: str = ""
    message: str = ""
    replicas: list[_Replica] = []


class _Application(msgspec.Struct):
    status: str = ""
    message: str = ""
    deployed_app_config: msgspec.Raw = msgspec.Raw(b"null")
    deployments: msgspec.Raw = msgspec.Raw(b"{}")


class _ServeDetails(msgspec.Struct):
    applications: dict[str, _Application]
    """Always there in Ray's answer: one without it is another server's, not that of an empty cluster."""


@dataclass
class RayServeClient(JsonClient):
    """Calls the dashboard of one Ray cluster.

    What did not change since the last answer is not decoded again, and is the same object.
    """

    _seen: dict[str, tuple[bytes, ApplicationState]] = field(default_factory=dict, init=False, repr=False)

    async def applications(self) -> dict[str, ApplicationState]:
        """The applications that Serve knows, by name.

        Raises:
            UnavailableError: the dashboard does not answer.
            RefusedError: the token is wrong.
        """
        status, content = await self.call("GET", _PATH)
        if status != 200:
            raise UnavailableError(
                f"GET {self.address}{_PATH}: {status}: this is not the dashboard of a Ray with Serve"
            )
        details: _ServeDetails = self.decode(content, _ServeDetails)
        self._seen = {name: self._state(name, app) for name, app in details.applications.items()}
        return {name: state for name, (_, state) in self._seen.items()}

    async def put(self, configs: Iterable[bytes]) -> None:
        """Make Serve run exactly these applications, each as JSON.

        Raises:
            UnavailableError: the dashboard does not answer.
            RefusedError: Serve does not accept the configuration.
        """
        body = b'{"proxy_location":"Disabled","applications":[%b]}' % b",".join(configs)
        status, _ = await self.call("PUT", _PATH, body=body, limit_seconds=PUT_SECONDS)
        if status != 200:
            raise UnavailableError(f"PUT {self.address}{_PATH}: {status}: nothing was taken")

    def _state(self, name: str, app: _Application) -> tuple[bytes, ApplicationState]:
        content = hashlib.blake2b(digest_size=16)
        # Ray counts restarts and times in there: a change that says nothing to us costs one decoding.
        for part in (app.status.encode(), app.message.encode(), app.deployed_app_config, app.deployments):
            content.update(part)
        digest = content.digest()
        before = self._seen.get(name)
        if before is not None and before[0] == digest:
            return before
        state = _decode(name, app)
        return digest, before[1] if before is not None and before[1] == state else state


def _decode(name: str, app: _Application) -> ApplicationState:
    deployments = msgspec.json.decode(app.deployments, type=dict[str, _Deployment])
    messages = [app.message, *(d.message for d in deployments.values())]
    replicas = [r for d in deployments.values() for r in d.replicas]
    return ApplicationState(
        name=name,
        status=app.status,
        message="; ".join(dict.fromkeys(m.strip() for m in messages if m.strip())),
        config=msgspec.json.decode(app.deployed_app_config) or {},
        running_replicas=sum(r.state == "RUNNING" for r in replicas),
        total_replicas=len(replicas),
    )
