"""What ``ray start`` has no option for; Ray calls it by the name in ``RAY_START_HOOK``."""

from __future__ import annotations

from typing import Any


def lean(params: Any, head: bool) -> None:  # noqa: ARG001  Ray's signature
    """Start no Ray Client server, which nothing here uses, and let the kernel choose the workers' ports.

    Ray's default range is the same for every cluster of a machine: two of them would compete for it.
    """
    params.ray_client_server_port = None
    params.min_worker_port = 0
    params.max_worker_port = 0
