"""`modelfleet crds --apply`: bring a cluster's CRDs up to date, which Helm never does."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from modelfleet_operator.api.crd import custom_resource_definitions
from modelfleet_operator.clients.errors import UnavailableError
from modelfleet_operator.clients.kube import Kind, KubeClient, connect

CRD: Final = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
ESTABLISH_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.2


async def apply_crds() -> list[str]:
    """Apply the CRDs server-side and wait until their resources can be used; their names.

    Raises:
        ClientError: the API server refuses or can't be reached, or does not establish one in time.
        kubernetes.aio.config.ConfigException: there are no credentials.
    """
    names = []
    async with await connect() as api:
        kube = KubeClient(api)
        for definition in custom_resource_definitions():
            body = {key: definition[key] for key in ("metadata", "spec")}
            await kube.apply(CRD, body)
            names.append(str(definition["metadata"]["name"]))
        for name in names:
            await _established(kube, name)
    return names


async def _established(kube: KubeClient, name: str) -> None:
    deadline = time.monotonic() + ESTABLISH_SECONDS
    while True:
        found = await kube.call("GET", CRD.path(name=name))
        conditions = found.get("status", {}).get("conditions") or ()  # null in the first moment
        if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
            return
        if time.monotonic() > deadline:
            raise UnavailableError(f"{name} is not established after {ESTABLISH_SECONDS:g} s: {conditions}")
        await asyncio.sleep(_POLL_SECONDS)
