"""Builds the C tools on first use, and runs them."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.benchmarks.common import OUTPUT
from tests.benchmarks.router.processes import Process, free_ports

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")


def tool(name: str) -> Path:
    """Path of a compiled tool; compiles it when its sources changed since.

    Raises:
        RuntimeError: without a C compiler, or when compiling fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("the router benchmark needs a C compiler: install gcc or clang, or set CC")
    source = SOURCES / f"{name}.c"
    inputs = source.read_bytes() + (SOURCES / "bench.h").read_bytes() + repr(FLAGS).encode()
    target = OUTPUT / "bin" / f"{name}-{hashlib.sha256(inputs).hexdigest()[:12]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, "-o", str(fresh), str(source), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{compiler} {source}: {done.stderr}")
    fresh.replace(target)
    return target


def load(
    port: int,
    requests: Path,
    *,
    cpu: int,
    mode: str = "closed",
    connections: int = 1,
    duration: float = 3.0,
    headers: Sequence[str] = (),
    **options: float | str | Path,
) -> dict[str, Any]:
    """Run the load generator and return its figures (times in milliseconds).

    Raises:
        RuntimeError: when the generator fails.
    """
    command = [str(tool("loadgen")), "--port", str(port), "--requests", str(requests), "--mode", mode]
    command += ["--connections", str(connections), "--duration", str(duration)]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    for header in headers:
        command += ["--header", header]
    limit = duration + float(str(options.get("drain", 30))) + 30
    done = subprocess.run(
        ["taskset", "-c", str(cpu), *command], capture_output=True, text=True, check=False, timeout=limit
    )
    if done.returncode:
        raise RuntimeError(f"loadgen failed with {done.returncode}: {done.stderr[-500:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _query(settings: Mapping[str, int | str]) -> str:
    return "&".join(f"{name}={value}" for name, value in settings.items())


class Engines:
    """Mock engines in one process: ``count`` replicas on consecutive ports, and a control port."""

    def __init__(
        self,
        count: int,
        *,
        cpu: int | None = None,
        log: Path | None = None,
        ports: Sequence[int] = (),
        settings: Mapping[str, int | str] | None = None,
    ) -> None:
        block = list(ports) or free_ports(count + 1)
        self.control, self.ports = block[0], block[1:]
        command = [str(tool("mock_engine")), "--ports", f"{self.ports[0]}-{self.ports[-1]}"]
        if settings:  # before the first request can come
            command += ["--config", _query(settings)]
        if log is not None:
            command += ["--log", str(log)]
        self.process = Process("mock_engine", [*command, "--control", str(self.control)], cpu=cpu)
        self.process.wait_port(self.control)

    @property
    def urls(self) -> list[str]:
        """Base URLs of the replicas."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def configure(self, **settings: int | str) -> None:
        """Change what the engines do (see ``mock_engine.c``); ``port`` limits a mode to one."""
        if "port" in settings:
            settings = {"port": settings["port"], **settings}
        self._get("/config?" + _query(settings))

    def reset(self) -> None:
        """Counters to zero, prefix caches empty."""
        self._get("/reset")

    def stats(self) -> list[dict[str, Any]]:
        """Counters, one mapping a replica."""
        replicas: list[dict[str, Any]] = self._get("/stats")["engines"]
        return replicas

    def total(self, name: str) -> int:
        """Sum of one counter over the replicas."""
        return sum(int(replica[name]) for replica in self.stats())

    def _get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.control, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise ValueError(f"mock engine refused {path}: {text.decode()}")
            return json.loads(text)
        finally:
            connection.close()

    def close(self) -> None:
        """End the process."""
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
