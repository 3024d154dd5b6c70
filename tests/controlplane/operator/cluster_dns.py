"""Runs a module with names of Services resolved to local ports, as the cluster's DNS has them for a pod.

``python -m tests.controlplane.operator.cluster_dns NAME:PORT=LOCAL... MODULE``
"""

from __future__ import annotations

import runpy
import socket
import sys
from typing import Any

_resolve = socket.getaddrinfo


def main() -> None:
    *entries, module = sys.argv[1:]
    table = {}
    for entry in entries:
        service, _, local = entry.partition("=")
        name, _, port = service.rpartition(":")
        table[name, int(port)] = int(local)

    def getaddrinfo(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        local = table.get((host, int(port))) if isinstance(port, int) else None
        return _resolve(*((host, port) if local is None else ("127.0.0.1", local)), *rest, **options)

    socket.getaddrinfo = getaddrinfo
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
