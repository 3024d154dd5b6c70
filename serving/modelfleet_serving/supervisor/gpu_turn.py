"""One after the other on a GPU that several engines share: each measures what is free while it starts.

vLLM takes the memory that others take or free meanwhile for its own: two that start at the same moment plan
with less than there is, or refuse to start. An engine that reserves a part of a GPU therefore waits until no
other one is just starting there. The lock is the kernel's, on a file for each device: it ends with its
holder, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
"""A file's lock has no event to wait for."""


class GpuTurn:
    """The right to start an engine on a shared GPU.

    Args:
        devices: of this replica, as ``CUDA_VISIBLE_DEVICES`` names them; none where it shares no GPU.
        folder: for the lock files; the same for all replicas of a machine.
    """

    def __init__(self, devices: str, folder: Path) -> None:
        self._path = folder / f"gpu-{devices.replace('/', '-')}.lock" if devices else None
        self._file: int | None = None

    @classmethod
    def of(cls, gpus: float, environ: Mapping[str, str]) -> GpuTurn:
        """The turn of a replica that reserves so many GPUs: only a part of one has to wait for others."""
        devices = environ.get("CUDA_VISIBLE_DEVICES", "") if 0 < gpus < 1 else ""
        return cls(devices, Path(tempfile.gettempdir(), f"modelfleet-{os.getuid()}"))

    async def take(self, seconds: float, stop: asyncio.Event) -> bool:
        """Wait for the turn, for so long at most: no GPU stands still for a lock that nobody gives back.

        Returns:
            False when ``stop`` was set meanwhile.
        """
        if self._path is None or self._file is not None:
            return True
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = asyncio.get_running_loop().time() + seconds
        try:
            while not stop.is_set():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._file = file
                    return True
                if asyncio.get_running_loop().time() > until:
                    _log.warning("%s: held for %g s; the engine starts beside another", self._path, seconds)
                    return True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), POLL_SECONDS)
            return False
        finally:
            if self._file is None:
                os.close(file)

    def give_back(self) -> None:
        """Let the next one start."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
