"""How a pool's Ray cluster is reached: addresses in one way of writing, and the token out of its Secret."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import urlsplit

from modelfleet_operator.api import ServingPool
from modelfleet_operator.clients.errors import RefusedError
from modelfleet_operator.clients.kube import NotFoundError
from modelfleet_operator.reconcile.ray_cluster import DASHBOARD_PORT, head_address
from modelfleet_serving.contract import REGISTRY_PORT


def dashboard_of(pool: ServingPool) -> str:
    """Ray's dashboard: one way to write each address, so that two pools with one cluster are seen."""
    address = pool.spec.ray.address
    if address is None:
        return head_address(pool, DASHBOARD_PORT)
    parts = urlsplit(address)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def token_of(secret: dict[str, Any], key: str) -> str:
    """A token out of a Secret.

    Raises:
        RefusedError: there is none, or none that a header can carry. The message says nothing of its content.
    """
    where = f"Secret {secret['metadata']['namespace']}/{secret['metadata']['name']}"
    data = (secret.get("data") or {}).get(key)
    if data is None:
        raise NotFoundError(f"{where} has no key {key}")
    token = base64.b64decode(data).strip()
    if not token or any(not 33 <= byte <= 126 for byte in token):
        raise RefusedError(f"{where}: {key} is no token: it is empty, or holds more than printable ASCII")
    return token.decode()


def registry_beside(address: str) -> str:
    """Port 8267 of the dashboard's host."""
    host = urlsplit(address).hostname or ""
    return f"http://{f'[{host}]' if ':' in host else host}:{REGISTRY_PORT}"
