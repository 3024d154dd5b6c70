"""The Kubernetes API as the operator uses it: server-side apply under one field manager, typed errors.

Objects are plain dictionaries: the operator handles four kinds of its own choice and needs no generated model
of every other one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

from modelfleet_operator.api import API_VERSION
from modelfleet_operator.clients.errors import RefusedError, UnavailableError

FIELD_MANAGER: Final = "modelfleet-operator"
CALL_SECONDS: Final = 15.0
CONNECTIONS: Final = 32
LIST_CHUNK: Final = 500
_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"

Object = dict[str, Any]


class ConflictError(UnavailableError):
    """Somebody else changed the object meanwhile: read it again and decide anew."""


class NotFoundError(RefusedError):
    """The object or its kind is not there."""


class InvalidError(RefusedError):
    """The API server does not accept the object."""


class ForbiddenError(RefusedError):
    """The operator's ServiceAccount may not do this, or the namespace is being deleted."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of resource and where the API serves it."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """URL path of the collection or of one object."""
        root = "/api/" if "/" not in self.api_version else "/apis/"
        parts = [root + self.api_version]
        if namespace:
            parts.append(f"namespaces/{quote(namespace)}")
        parts.append(self.plural)
        if name:
            parts.append(quote(name))
        if subresource:
            parts.append(subresource)
        return "/".join(parts)


MODEL_DEPLOYMENT: Final = Kind(API_VERSION, "ModelDeployment", "modeldeployments")
SERVING_POOL: Final = Kind(API_VERSION, "ServingPool", "servingpools")
RAY_CLUSTER: Final = Kind("ray.io/v1", "RayCluster", "rayclusters")
SECRET: Final = Kind("v1", "Secret", "secrets")
EVENT: Final = Kind("events.k8s.io/v1", "Event", "events")
LEASE: Final = Kind("coordination.k8s.io/v1", "Lease", "leases")


async def connect() -> ApiClient:
    """A client with the pod's ServiceAccount, or with the kubeconfig outside a cluster; its owner closes it.

    Raises:
        kubernetes.aio.config.ConfigException: there are no credentials.
    """
    configuration = Configuration()
    if in_cluster():
        load_incluster_config(configuration)
    else:
        # The library looks at the variable when it is imported, which may be long ago.
        await load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
    configuration.connection_pool_maxsize = CONNECTIONS
    return ApiClient(configuration)


def in_cluster() -> bool:
    """Whether this process runs in a pod; an explicit kubeconfig goes first."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and not os.environ.get("KUBECONFIG")


class KubeClient:
    """Calls the API server. Every call has a time-out and raises one of the typed errors.

    Args:
        api: connection and credentials; its owner closes it.
        timeout: seconds for one call.
        manager: field manager of everything that is written.
    """

    def __init__(self, api: ApiClient, timeout: float = CALL_SECONDS, manager: str = FIELD_MANAGER) -> None:
        self._api = api
        self._timeout = timeout
        self._manager = manager

    async def apply(self, kind: Kind, body: Mapping[str, Any], *, subresource: str = "") -> Object:
        """Server-side apply: the fields of ``body`` become ours, fields of ours that it lacks go.

        Raises:
            ConflictError: ``metadata.uid`` names an object that is gone.
            InvalidError, NotFoundError, ForbiddenError, UnavailableError: see there.
        """
        metadata = body["metadata"]
        path = kind.path(metadata.get("namespace"), metadata["name"], subresource)
        query = {"fieldManager": self._manager, "force": "true"}
        document = {"apiVersion": kind.api_version, "kind": kind.kind, **body}
        return await self.call("PATCH", path, query=query, body=document, content_type=_APPLY)

    async def apply_status(
        self, kind: Kind, metadata: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        """Server-side apply of the status subresource."""
        return await self.apply(
            kind, {"metadata": dict(metadata), "status": dict(status)}, subresource="status"
        )

    async def set_finalizers(
        self, kind: Kind, namespace: str, name: str, finalizers: list[str], resource_version: str
    ) -> Object:
        """Replace the finalizers of exactly this version of an object.

        Raises:
            ConflictError: the object has changed since.
            NotFoundError: it is gone.
        """
        body = {"metadata": {"finalizers": finalizers, "resourceVersion": resource_version}}
        query = {"fieldManager": self._manager}
        return await self.call(
            "PATCH", kind.path(namespace, name), query=query, body=body, content_type=_MERGE
        )

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """One object.

        Raises:
            NotFoundError: it is not there.
        """
        return await self.call("GET", kind.path(namespace, name))

    async def list(self, kind: Kind, namespace: str | None = None, selector: str = "") -> list[Object]:
        """All objects of a kind, fetched in chunks."""
        query = {"limit": str(LIST_CHUNK), **({"labelSelector": selector} if selector else {})}
        found: list[Object] = []
        while True:
            page = await self.call("GET", kind.path(namespace), query=query)
            # Items of a list lack what the list itself says.
            head = {"apiVersion": kind.api_version, "kind": kind.kind}
            found += [{**head, **item} for item in page["items"]]
            token = page["metadata"].get("continue")
            if not token:
                return found
            query["continue"] = token

    async def create(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        """Create an object.

        Raises:
            ConflictError: it is there already.
        """
        document = {"apiVersion": kind.api_version, "kind": kind.kind, **body}
        query = {"fieldManager": self._manager}
        return await self.call(
            "POST", kind.path(body["metadata"].get("namespace")), query=query, body=document
        )

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """One call.

        Raises:
            UnavailableError: no answer in time, 5xx or 429.
            RefusedError: see its kinds above.
        """
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self._api.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        limit = aiohttp.ClientTimeout(total=self._timeout, sock_connect=5)
        try:
            answer = await self._api.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=limit
            )
            content = await answer.read()
        except TimeoutError as error:
            raise UnavailableError(f"{method} {path}: no answer within {self._timeout:g} s") from error
        except aiohttp.ClientError as error:
            raise UnavailableError(f"{method} {path}: {error}") from error
        if answer.status >= 400:
            raise _error(answer.status, f"{method} {path}: {answer.status} {_message(content)}")
        decoded: Object = msgspec.json.decode(content)
        return decoded


def _error(status: int, text: str) -> Exception:
    if status == 409:
        return ConflictError(text)
    if status == 404:
        return NotFoundError(text)
    if status == 403:
        return ForbiddenError(text)
    if status in (400, 422):
        return InvalidError(text)
    if status == 429 or status >= 500:
        return UnavailableError(text)
    return RefusedError(text)


def _message(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["message"])[:2000]
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:500].decode(errors="replace")
