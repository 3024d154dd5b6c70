"""A Ray cluster of one node on this machine, for `modelfleet up` and for tests.

It listens on loopback alone, has token authentication on, and ends with its owner, whatever ends that one:
a guard process holds the tree (:mod:`modelfleet_serving.supervisor.guard`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import aiohttp

from modelfleet_operator.clients.processes import free_port

LOOPBACK: Final = "127.0.0.1"
START_SECONDS: Final = 120.0
OBJECT_STORE_BYTES: Final = 100 * 2**20
"""Ray's smallest is 75 MiB; only small control messages of Serve go through it."""
_ATTEMPTS: Final = 3
_POLL_SECONDS: Final = 0.1
_KILL_AFTER_SECONDS: Final = 1.5
"""Enough for an engine's guard to end its own tree; Ray has nothing to keep."""
_STOP_SECONDS: Final = 15.0
_TAIL_BYTES: Final = 4000
_SERVE_API: Final = "/api/serve/applications/"


class LocalRayError(Exception):
    """Ray did not start; the message has the end of its log."""


class LocalRay:
    """One local cluster.

    Args:
        directory: for the token and the log of the start. Ray's own files lie in a folder with a short path
            under the system's temporary directory, because the path of a Unix socket is limited.
        on_progress: gets a line for people now and then.
        cpus: CPUs that Ray may hand out; ``None`` lets Ray count them.
        gpus: likewise.
        resources: further resources of the node, such as ``{"accelerator:A10": 1}``.
        environment: further variables for all Ray processes and so for the replicas.
    """

    def __init__(
        self,
        directory: Path,
        on_progress: Callable[[str], None] | None = None,
        *,
        cpus: float | None = None,
        gpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.token_file = directory / "ray-token"
        self.log = directory / "ray.log"
        self.engine_logs = directory / "engines"
        self.temp_dir = _temp_dir(directory)
        self.address = ""
        """``HOST:PORT`` of the cluster's control service."""
        self.dashboard_url = ""
        self._say = on_progress or (lambda _line: None)
        self._cpus = cpus
        self._gpus = gpus
        self._resources = dict(resources or {})
        self._environment = dict(environment or {})
        self._guard: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[str] | None = None

    def token(self) -> str:
        """The cluster's token."""
        return self.token_file.read_text().strip()

    async def start(self) -> None:
        """Start the cluster and wait until Serve's API answers.

        Raises:
            LocalRayError: it ended or did not answer in time.
        """
        began = time.monotonic()
        await asyncio.to_thread(self._prepare)
        self._say("Ray: starting")
        for attempt in range(1, _ATTEMPTS + 1):
            await self._launch()
            try:
                await self._until_ready(began + START_SECONDS)
            except LocalRayError:
                # Somebody else may have taken a port between its choice and its use.
                await self.stop()
                if attempt == _ATTEMPTS or time.monotonic() > began + START_SECONDS / 2:
                    raise
                await asyncio.to_thread(self._prepare)
                continue
            break
        self._say(f"Ray: ready after {time.monotonic() - began:.1f} s, dashboard {self.dashboard_url}")

    async def wait(self) -> str:
        """Wait until the cluster has ended; what the guard said of its end."""
        if self._ended is None:
            return ""
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """End every process of the cluster, engines included, and remove Ray's files."""
        if self._guard is not None and self._ended is not None:
            await self._end(self._guard, self._ended)
        self._guard = self._ended = None
        await asyncio.to_thread(shutil.rmtree, self.temp_dir, ignore_errors=True)

    async def _end(self, guard: asyncio.subprocess.Process, ended: asyncio.Task[str]) -> None:
        if guard.stdin is not None:
            with contextlib.suppress(OSError):
                guard.stdin.write(f"end {_KILL_AFTER_SECONDS}\n".encode())
            guard.stdin.close()
        try:
            await asyncio.wait_for(asyncio.shield(ended), _STOP_SECONDS)
        except TimeoutError:
            ended.cancel()
            raise LocalRayError(f"processes of Ray are still there after {_STOP_SECONDS:g} s") from None

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # What a run that was killed left behind. The owner is checked: others can write there, too.
        if self.temp_dir.is_symlink() or (
            self.temp_dir.exists() and self.temp_dir.stat().st_uid != os.getuid()
        ):
            raise LocalRayError(f"{self.temp_dir} belongs to somebody else")
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        self.temp_dir.mkdir(mode=0o700, parents=True)
        self.token_file.unlink(missing_ok=True)
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.log.unlink(missing_ok=True)
        shutil.rmtree(self.engine_logs, ignore_errors=True)

    async def _launch(self) -> None:
        gcs_port, dashboard_port = free_port(), free_port()
        self.address = f"{LOOPBACK}:{gcs_port}"
        self.dashboard_url = f"http://{LOOPBACK}:{dashboard_port}"
        guard = [sys.executable, "-m", "modelfleet_serving.supervisor.guard", "--log", str(self.log)]
        guard += ["--grace", str(_KILL_AFTER_SECONDS), "--remove", str(self.temp_dir), "--"]
        self._guard = await asyncio.create_subprocess_exec(
            *guard,
            *self._command(gcs_port, dashboard_port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            env=self._ray_environment(),
            cwd=self.directory,
        )
        assert self._guard.stdout is not None  # noqa: S101  a pipe, see above
        self._ended = asyncio.create_task(_last_words(self._guard.stdout), name="ray-ended")

    def _command(self, gcs_port: int, dashboard_port: int) -> list[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--node-ip-address={LOOPBACK}", f"--port={gcs_port}"]
        command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"]
        command += ["--dashboard-agent-listen-port=0", f"--temp-dir={self.temp_dir}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        # No autoscaler of clouds, and nobody reads workers' output through a driver.
        command += ["--no-monitor", "--include-log-monitor=false"]
        if self._cpus is not None:
            command.append(f"--num-cpus={self._cpus:g}")
        if self._gpus is not None:
            command.append(f"--num-gpus={self._gpus:g}")
        if self._resources:
            command.append(f"--resources={json.dumps(self._resources)}")
        return command

    def _ray_environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {
            **inherited,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray replaces a loopback address by one that other hosts reach, unless it may not be a cluster.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_START_HOOK": "modelfleet_operator.clients.ray_start_hook.lean",
            "DASHBOARD_METRIC_PORT": str(free_port()),
            # A worker is started when an actor needs it: fewer processes and a quicker start.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_task_events_report_interval_ms": "0",
            "MODELFLEET_LOG_DIR": str(self.engine_logs),
            **self._environment,
        }

    async def _until_ready(self, deadline: float) -> None:
        assert self._ended is not None  # noqa: S101  _launch() comes first
        headers = {"authorization": f"Bearer {self.token()}"}
        limit = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(timeout=limit, headers=headers) as session:
            while not self._ended.done():
                try:
                    async with session.get(self.dashboard_url + _SERVE_API) as answer:
                        if answer.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass  # not listening yet
                if time.monotonic() > deadline:
                    raise LocalRayError(f"Ray does not answer after {START_SECONDS:g} s:\n{self._tail()}")
                await asyncio.wait({self._ended}, timeout=_POLL_SECONDS)
        raise LocalRayError(f"Ray ended while it started: {self._ended.result()}\n{self._tail()}")

    def _tail(self) -> str:
        try:
            return self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""


async def _last_words(output: asyncio.StreamReader) -> str:
    """The last line that the guard wrote; it comes once the whole tree is gone."""
    last = b""
    async for line in output:
        last = line
    return last.decode(errors="replace").strip()


def _temp_dir(directory: Path) -> Path:
    """A short path of its own for each directory and user."""
    key = hashlib.sha256(f"{os.getuid()}:{directory.absolute()}".encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"modelfleet-{key}"
