"""The operator and the registry as processes, as their pods run them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.controlplane.bed import wait_until
from tests.controlplane.operator.prepared import Forked

from modelfleet_operator.clients.processes import die_with_parent, free_port


class Process:
    """One program with its log; ends with the test."""

    def __init__(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = dict(environment)
        self.process: subprocess.Popen[bytes] | Forked | None = None

    def start(self) -> None:
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("MODELFLEET_", "KUBERNETES_", "RAY_"))
        }
        self.process = self._run({**clean, **self._environment})

    def _run(self, environment: dict[str, str]) -> subprocess.Popen[bytes] | Forked:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it only calls the kernel
                env=environment,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """Die without goodbye."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, timeout: float = 10) -> float:
        """SIGTERM; seconds until it has ended.

        Raises:
            subprocess.TimeoutExpired: it is still there.
        """
        process, self.process = self.process, None
        if process is None:
            return 0.0
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return time.monotonic() - began

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()


class OperatorProcess(Process):
    """``python -m modelfleet_operator.main`` with a kubeconfig.

    Args:
        services: ports of this machine by ``NAME:PORT`` of the Services that they stand for.
        prepared: fork it from a process that has imported it, instead of starting Python anew.
    """

    def __init__(
        self,
        kubeconfig: Path,
        log: Path,
        namespace: str = "modelfleet-system",
        services: Mapping[str, int] | None = None,
        *,
        prepared: bool = False,
        **settings: str,
    ) -> None:
        self.port = free_port()
        environment = {
            "KUBECONFIG": str(kubeconfig),
            "MODELFLEET_NAMESPACE": namespace,
            "MODELFLEET_LISTEN": f"127.0.0.1:{self.port}",
            "MODELFLEET_LEADER_ELECTION": "false",
            **{f"MODELFLEET_{name}": value for name, value in settings.items()},
        }
        command = [sys.executable, "-m", "modelfleet_operator.main"]
        if services:
            names = [f"{service}={port}" for service, port in services.items()]
            command[2:2] = ["tests.controlplane.operator.cluster_dns", *names]
            environment["PYTHONPATH"] = str(Path(__file__).parents[3])
        super().__init__("operator", command, log, environment)
        assert not (prepared and services), "the names of Services need a Python of their own"
        self._prepared = prepared

    def _run(self, environment: dict[str, str]) -> subprocess.Popen[bytes] | Forked:
        return Forked(self.log, environment) if self._prepared else super()._run(environment)

    def fetch(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=3) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def wait_ready(self, timeout: float = 20) -> None:
        def ready() -> bool:
            if self.ended():
                raise AssertionError(f"the operator ended:\n{self.text()[-4000:]}")
            return self.fetch("/readyz")[0] == 200

        wait_until(ready, timeout=timeout, what="the operator ready", interval=0.05)


class RegistryProcess(Process):
    """``python -m modelfleet_serving.registry``."""

    def __init__(self, directory: Path, token: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.token = token
        token_file = directory / f"registry-{self.port}.token"
        token_file.write_text(token)
        command = [sys.executable, "-m", "modelfleet_serving.registry", "--listen", f"127.0.0.1:{self.port}"]
        command += ["--token-file", str(token_file)]
        super().__init__("registry", command, directory / f"registry-{self.port}.log", {})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        def ready() -> bool:
            if self.ended():
                raise AssertionError(f"the registry ended:\n{self.text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=2):
                    return True
            except OSError:
                return False

        wait_until(ready, timeout=20, what="the registry ready", interval=0.05)
