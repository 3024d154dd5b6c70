"""Processes under measurement: pinned to a core, their CPU seconds and memory read from outside."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Cores:
    """Which core does what. The contestant has one for itself."""

    load: int
    proxy: int
    engines: int

    @classmethod
    def choose(cls) -> Cores:
        """The first cores this process may use; with two, generator and engines share one.

        Raises:
            RuntimeError: with a single core there is nothing to compare.
        """
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise RuntimeError("the router benchmark needs two cores: one for the router, one for the rest")
        return cls(load=cores[0], proxy=cores[1], engines=cores[2] if len(cores) > 2 else cores[0])


def free_ports(count: int) -> list[int]:
    """``count`` consecutive ports that nobody listens on."""
    for _ in range(1000):
        start = random.randrange(
            20000, 32000 - count
        )  # below the ephemeral ports; runs side by side don't meet
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(start, start + count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return list(range(start, start + count))
    raise RuntimeError(f"no {count} consecutive free ports")


class Process:
    """A child process with its descendants, optionally on one core; its output goes to a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cpu: int | None = None,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        pinned = ["taskset", "-c", str(cpu), *command] if cpu is not None else list(command)
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("wb")) if log else subprocess.DEVNULL
            self.popen = subprocess.Popen(
                pinned,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        self.pid = self.popen.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.popen.poll() is None

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants."""
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """CPU time of the whole tree so far, children that ended included."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def rss_mib(self) -> float:
        """Resident memory of the whole tree in MiB; pages shared by its processes count once for each."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / MEBIBYTE

    def wait_port(self, port: int, timeout: float = 60.0) -> None:
        """Wait until something listens on ``port``.

        Raises:
            RuntimeError: when the process ends or the time is over, with the end of its log.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self.alive():
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} does not listen on port {port}: {self.log_tail()}")

    def log_tail(self, size: int = 1500) -> str:
        """The end of the log."""
        if self.log is None or not self.log.exists():
            return ""
        return self.log.read_bytes()[-size:].decode(errors="replace")

    def stop(self, timeout: float = 5.0) -> None:
        """End the whole tree: politely, then not."""
        tree = self.tree()
        for signum, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, timeout)):
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signum)
            _, tree = psutil.wait_procs(tree, timeout=patience)
            if not tree:
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=timeout)
