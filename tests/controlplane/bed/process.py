"""Processes of the test bed: started, watched, stopped, paused; none survives the test run."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.05


class ComponentError(RuntimeError):
    """A component did not start, did not become ready in time, or ended by itself."""


def wait_until(
    condition: Callable[[], bool], *, timeout: float, what: str, interval: float = _POLL_SECONDS
) -> float:
    """Wait until `condition` holds and return the seconds that took.

    Raises:
        TimeoutError: it does not hold within `timeout` seconds; the message names `what`.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            raise TimeoutError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(interval)
    return time.monotonic() - started


def http_ok(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Whether a GET of `url` answers 200 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2, context=context) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


class Ports:
    """Free TCP ports on 127.0.0.1 that stay ours while a server is down for a restart.

    They lie below the kernel's ephemeral range: a port in that range may be taken by any outgoing
    connection while the server is away, and a client that reconnects to it may even meet itself.
    """

    _LOW, _HIGH = 20000, 32000

    def __init__(self) -> None:
        self._given: set[int] = set()

    def take(self) -> int:
        """A port that nobody listens on and that was not given before.

        Raises:
            ComponentError: none is free.
        """
        for _ in range(500):
            port = random.randrange(self._LOW, self._HIGH)
            if port in self._given:
                continue
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            self._given.add(port)
            return port
        raise ComponentError(f"no free port between {self._LOW} and {self._HIGH}")


class Guard:
    """Kills the components and removes their files if this process dies (see ``guard.py``)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, pid: int) -> None:
        self._say(f"watch {pid}")

    def forget(self, pid: int) -> None:
        self._say(f"forget {pid}")

    def remove(self, path: Path) -> None:
        """Remove a directory tree at the end."""
        self._say(f"remove {path}")

    def close(self) -> None:
        """Let the guard end its work; returns when it has."""
        with self._lock:
            if self._process.stdin is not None and not self._process.stdin.closed:
                self._process.stdin.close()
        self._process.wait(timeout=30)

    def _say(self, line: str) -> None:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


class Component:
    """One server process of the test bed, with its log in a file.

    Args:
        name: its name in messages and of its log.
        argv: the command.
        log: the log file; restarts append to it.
        guard: what ends it if we die.
        ready: whether it serves.
        env: its environment; by default ours.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        guard: Guard,
        ready: Callable[[], bool],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.log = log
        self._guard = guard
        self._ready = ready
        self._env = dict(env) if env is not None else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id.

        Raises:
            ComponentError: it does not run.
        """
        if self._process is None or self._process.poll() is not None:
            raise ComponentError(f"{self.name} does not run")
        return self._process.pid

    def start(self) -> None:
        """Start it; does not wait until it serves."""
        if self.running:
            raise ComponentError(f"{self.name} runs already")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self.log.parent,
                start_new_session=True,
            )
        self._guard.watch(self._process.pid)

    def wait_ready(self, timeout: float = 60) -> None:
        """Wait until it serves.

        Raises:
            ComponentError: it ended or is not ready in time; the message has the end of its log.
        """
        try:
            wait_until(lambda: not self.running or self._ready(), timeout=timeout, what=f"{self.name} ready")
        except TimeoutError as error:
            raise ComponentError(f"{error}\n{self.log_tail()}") from error
        if not self.running:
            raise ComponentError(f"{self.name} ended with {self._exit_code()}\n{self.log_tail()}")

    def stop(self, timeout: float = 20) -> None:
        """Ask it to end (SIGTERM), and kill it when it doesn't within `timeout` seconds."""
        self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a machine that dies does."""
        self._end(signal.SIGKILL, 20)

    def restart(self, *, hard: bool = False, timeout: float = 60) -> None:
        """Stop or kill it, start it again and wait until it serves."""
        if hard:
            self.kill()
        else:
            self.stop()
        self.start()
        self.wait_ready(timeout)

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen one go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _exit_code(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def _end(self, how: signal.Signals, timeout: float) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, how)
            if how is not signal.SIGKILL:
                os.killpg(process.pid, signal.SIGCONT)  # a frozen one takes no SIGTERM
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)
        self._guard.forget(process.pid)
        self._process = None
