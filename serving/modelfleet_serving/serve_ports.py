"""Keeps a Serve replica's own port on loopback where Ray itself is on loopback."""

from __future__ import annotations

import ipaddress
import logging
from typing import Any, Final

_log = logging.getLogger(__name__)

_EVERYWHERE: Final = "[::]:"


def confine(node: str) -> None:
    """Make this process's Serve replica listen on the node's address when that is loopback.

    Ray Serve 2.60 opens a gRPC port for calls between deployments in every replica, once its constructor
    has returned, on all interfaces whatever the node's address is. There is no setting for it, so the
    function that opens it is wrapped, in this process alone; tests/ray looks at what listens.
    """
    if not ipaddress.ip_address(node).is_loopback:
        return
    from ray.serve._private import replica  # noqa: PLC0415  internal: only where it is needed

    original: Any = getattr(replica, "add_port_to_grpc_server", None)
    if original is None:
        _log.warning("this version of Ray opens its ports in another way: they may be open to other hosts")
        return

    def on_loopback(server: Any, address: str) -> Any:
        if address.startswith(_EVERYWHERE):
            host = f"[{node}]" if ":" in node else node
            address = f"{host}:{address.removeprefix(_EVERYWHERE)}"
        return original(server, address)

    replica.add_port_to_grpc_server = on_loopback
