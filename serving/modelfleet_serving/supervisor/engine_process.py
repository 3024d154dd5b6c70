"""The engine as a process tree under a guard, with its log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from modelfleet_serving.supervisor import guard

LOG_BYTES: Final = 16 * 2**20
TAIL_BYTES: Final = 16 * 1024
_START_SECONDS: Final = 30.0
_RELEASE_SECONDS: Final = 5.0
_READ_BYTES: Final = 256 * 1024
_SECRET_NAME: Final = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SECRET_LENGTH: Final = 6
"""Shorter values are no secrets, and their like stands in every log."""


class _Word(msgspec.Struct):
    """A line of the guard."""

    started: int | None = None
    code: int | None = None
    signal: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Exit:
    """How an engine ended."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return f"exit code {self.code}" if self.code is not None else "the guard process was killed"


class LaunchError(Exception):
    """The process couldn't be made."""


class EngineProcess:
    """One start of an engine. Its processes never outlive us: see :mod:`.guard`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.pid = 0
        self._control: int | None = None
        """Write end of the guard's standard input; its closing ends the tree."""
        self._output: io.RawIOBase | None = None
        self._words: _Words | None = None
        self._offset = 0
        self._inode = 0
        self._began = (0, 0)
        """Inode and size of the log when this engine was started."""
        self._partial = b""

    async def start(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        """Make the process.

        Raises:
            LaunchError: the guard or the command couldn't be run.
        """
        self._remember_log_end()
        # -I -S: the engine's environment (PYTHONPATH and the like) is not the guard's.
        arguments = [sys.executable, "-I", "-S", guard.__file__, "--log", str(self.log)]
        arguments += ["--log-bytes", str(LOG_BYTES), "--", *command]
        try:
            spawning = asyncio.create_task(asyncio.to_thread(self._spawn, arguments, environment, cwd))
            try:
                await asyncio.shield(spawning)
            finally:  # a thread can't be cancelled: what it makes has to be let go of
                await asyncio.wait({spawning})
            self._words = await _reader(self._output)
            word = await asyncio.wait_for(self._next_word(), _START_SECONDS)
        except (OSError, TimeoutError) as error:
            await self.release()
            reason = str(error) or "it says nothing"
            raise LaunchError(f"the engine's guard process doesn't start: {reason}") from error
        except asyncio.CancelledError:
            await self.release()
            raise
        if word is None or word.started is None:
            await self.release()
            raise LaunchError(f"the engine's guard process ended: {word.error if word else 'without a word'}")
        self.pid = word.started

    async def wait(self) -> Exit:
        """Wait until the whole process tree is gone."""
        word = await self._next_word()
        if word is None:
            # Somebody killed the guard. The engine has died with it; its group may have not.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            return Exit()
        return Exit(code=word.code, signal=word.signal)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the engine's first process alone."""
        self._order(f"signal {int(number)}")

    def end(self, grace_seconds: float) -> None:
        """SIGTERM to every process of the tree, and SIGKILL after the grace."""
        self._order(f"end {grace_seconds:g}")

    async def release(self) -> None:
        """Let go of the guard, which ends what is left, and wait for its end."""
        if self._control is not None:
            os.close(self._control)
            self._control = None
        output, self._output = self._output, None
        words, self._words = self._words, None
        if words is None:
            if output is not None:
                output.close()
            return
        with contextlib.suppress(TimeoutError):  # it goes on without us
            async with asyncio.timeout(_RELEASE_SECONDS):
                await words.reader.read()
        words.transport.close()

    def _spawn(self, arguments: list[str], environment: Mapping[str, str], cwd: Path) -> None:
        """Make the guard. What we start is its parent, which ends at once."""
        orders_read, self._control = os.pipe()
        words_read, words_write = os.pipe()
        self._output = os.fdopen(words_read, "rb", buffering=0)
        try:
            subprocess.run(
                arguments,
                stdin=orders_read,
                stdout=words_write,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=dict(environment),
                cwd=cwd,
                timeout=_START_SECONDS,
                check=True,
            )
        except subprocess.SubprocessError as error:
            raise OSError(str(error)) from error
        finally:
            os.close(orders_read)
            os.close(words_write)

    def new_lines(self) -> list[str]:
        """What the engine wrote since the last call; the rest of a burst is left out."""
        try:
            with self.log.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != self._inode:  # rotated
                    self._inode, self._offset = os.fstat(file.fileno()).st_ino, 0
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_READ_BYTES:]
        return [line.decode(errors="replace") for line in lines]

    def tail(self) -> list[str]:
        """The last lines of what it wrote."""
        try:
            with self.log.open("rb") as file:
                status = os.fstat(file.fileno())
                start = self._began[1] if status.st_ino == self._began[0] else 0
                file.seek(max(status.st_size - TAIL_BYTES, start))
                data = file.read()
        except OSError:
            return []
        return [line.rstrip() for line in data.decode(errors="replace").splitlines() if line.strip()]

    def owns_port(self, port: int) -> bool:
        """Whether the process that listens on a port is of this engine, or can't be told."""
        sockets = {f"socket:[{inode}]" for inode in _listening(port)}
        if not sockets:
            return True
        seen = False
        for pid in (self.pid, *guard.descendants(self.pid)):
            try:
                links = [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            seen = True
            if any(str(link) in sockets for link in links):
                return True
        return not seen

    def _remember_log_end(self) -> None:
        """What an earlier start of the engine wrote is not this one's."""
        self.log.touch(mode=0o600)
        status = self.log.stat()
        self._began = self._inode, self._offset = status.st_ino, status.st_size

    def _order(self, line: str) -> None:
        if self._control is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended
                os.write(self._control, line.encode() + b"\n")  # a pipe takes a line without blocking

    async def _next_word(self) -> _Word | None:
        if self._words is None:
            return None
        line = await self._words.reader.readline()
        try:
            return msgspec.json.decode(line, type=_Word)
        except msgspec.DecodeError:
            return None


@dataclass(frozen=True)
class _Words:
    reader: asyncio.StreamReader
    transport: asyncio.ReadTransport


async def _reader(pipe: io.RawIOBase | None) -> _Words:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return _Words(reader, transport)


def _listening(port: int) -> list[str]:
    """Inodes of the sockets that listen on a TCP port of this machine."""
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                # local address in hexadecimal; state 0A is LISTEN
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.append(fields[9])
    return found


def secrets_of(*environments: Mapping[str, str]) -> list[str]:
    """Values of variables whose names look like secrets, the longest first."""
    found = {
        value
        for environment in environments
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_LENGTH
    }
    return sorted(found, key=len, reverse=True)


def scrub(text: str, secrets: Iterable[str]) -> str:
    """The text without these values."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def free_port(host: str) -> int:
    """A TCP port that nobody uses on this address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
