"""Operators that start at once: forked from a server that has imported everything already.

Importing the operator takes seconds of a slow machine's time, and these tests start it about a hundred times.
The forked process runs the operator's entry point with an environment, a log and a session of its own; only
the import is not its own. ``test_process.py`` starts it as its pod does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

from modelfleet_operator.clients.processes import die_with_parent

_MAIN = "modelfleet_operator.main"


class Forked:
    """A running operator, with what these tests use of ``subprocess.Popen``."""

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self._process = _context().Process(target=_become_operator, args=(str(log), dict(environment)))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it is still there.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("operator", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Like ``kill -NUMBER``."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_MAIN])
    return context


def _become_operator(log: str, environment: dict[str, str]) -> None:
    die_with_parent()
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    from modelfleet_operator.main import run

    run()
