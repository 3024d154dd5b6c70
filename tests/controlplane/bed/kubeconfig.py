"""kubeconfig files: one context, credentials inline."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tests.controlplane.bed.pki import Pair


def client_certificate(pair: Pair) -> dict[str, Any]:
    """A user entry that authenticates with a certificate."""
    return {
        "client-certificate-data": base64.b64encode(pair.certificate).decode(),
        "client-key-data": base64.b64encode(pair.key).decode(),
    }


def bearer_token(token: str) -> dict[str, Any]:
    """A user entry that authenticates with a token."""
    return {"token": token}


def write(path: Path, *, server: str, ca: bytes, user: dict[str, Any], namespace: str = "default") -> Path:
    """Write a kubeconfig (mode 0600; JSON, which is YAML) and return its path."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bed",
        "clusters": [
            {
                "name": "bed",
                "cluster": {
                    "server": server,
                    "certificate-authority-data": base64.b64encode(ca).decode(),
                },
            }
        ],
        "contexts": [{"name": "bed", "context": {"cluster": "bed", "user": "bed", "namespace": namespace}}],
        "users": [{"name": "bed", "user": user}],
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))
    return path
