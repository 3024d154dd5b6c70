"""Where `modelfleet up` says what it runs: one directory, one lock, one file for `get` and `chat`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec
from filelock import FileLock, Timeout
from platformdirs import user_state_path

STATE_ENV: Final = "MODELFLEET_STATE"


class AlreadyRunningError(Exception):
    """Another `modelfleet up` uses the same state directory."""


class NotRunningError(Exception):
    """No `modelfleet up` runs."""


class LocalInfo(msgspec.Struct, rename="camel", kw_only=True):
    """What a running `modelfleet up` publishes."""

    pid: int
    router: str
    """Base URL for OpenAI clients, without ``/v1``."""
    registry: str = ""
    dashboard: str = ""
    logs: str = ""
    deployments: list[dict[str, Any]] = []
    """ModelDeployments with status, as ``kubectl get -o json`` would give them."""


def default_state_dir() -> Path:
    """The directory, from the environment or the user's state folder."""
    return Path(os.environ.get(STATE_ENV) or user_state_path("modelfleet") / "local")


class LocalState:
    """One state directory."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_state_dir()
        self._lock = FileLock(self.directory / "up.lock", timeout=0)

    @property
    def token_file(self) -> Path:
        """Ray's authentication token of the local cluster."""
        return self.directory / "ray-token"

    @property
    def _file(self) -> Path:
        return self.directory / "state.json"

    def acquire(self) -> None:
        """Take the directory for this process.

        Raises:
            AlreadyRunningError: it is taken.
        """
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._lock.acquire()
        except Timeout:
            info = self._read()
            where = f" (pid {info.pid}, {info.router})" if info else ""
            raise AlreadyRunningError(
                f"`modelfleet up` already runs here{where}; stop it, or set {STATE_ENV} to another directory"
            ) from None

    def release(self) -> None:
        """Give the directory back; nothing stays in it but logs."""
        for path in (self._file, self.token_file):
            path.unlink(missing_ok=True)
        self._lock.release()
        (self.directory / "up.lock").unlink(missing_ok=True)

    def publish(self, info: LocalInfo) -> None:
        """Replace what is published, atomically."""
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(info))
        fresh.replace(self._file)

    def read(self) -> LocalInfo:
        """What the running `up` publishes.

        Raises:
            NotRunningError: none runs.
        """
        info = self._read()
        if info is None or not _alive(info.pid):
            raise NotRunningError(f"no `modelfleet up` runs here ({self.directory}); start one with -f FILE")
        return info

    def _read(self) -> LocalInfo | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=LocalInfo)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
