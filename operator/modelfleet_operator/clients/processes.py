"""Child processes that end with us, and the ports that they listen on."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp

_PR_SET_PDEATHSIG: Final = 1
_POLL_SECONDS: Final = 0.1
_TAIL_BYTES: Final = 4000


class ProcessFailedError(Exception):
    """A child process ended or did not get ready; the message has the end of its log."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """For ``preexec_fn``: the kernel ends this process when the one that made it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ChildProcess:
    """One child with its log file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = list(command)
        self.log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, in a session of its own: a Ctrl-C in the terminal reaches us alone."""
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    async def wait(self) -> int:
        """Exit code, once it has ended."""
        assert self._process is not None  # noqa: S101  start() comes first
        return await self._process.wait()

    async def until_http_ok(self, url: str, limit_seconds: float) -> None:
        """Wait until a URL answers 200.

        Raises:
            ProcessFailedError: the process ended or the time is over.
        """
        assert self._process is not None  # noqa: S101
        deadline = asyncio.get_running_loop().time() + limit_seconds
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while self._process.returncode is None and asyncio.get_running_loop().time() < deadline:
                try:
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass  # not listening yet
                await asyncio.sleep(_POLL_SECONDS)
        code = self._process.returncode
        what = "did not get ready" if code is None else f"ended with code {code}"
        raise ProcessFailedError(f"{self.command[2]} {what}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        try:
            return self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""

    async def stop(self, limit_seconds: float) -> None:
        """End it: SIGTERM, then SIGKILL."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), limit_seconds)
        except TimeoutError:
            process.kill()
            await process.wait()
