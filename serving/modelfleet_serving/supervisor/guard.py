"""A small process between an owner and the process tree that it runs: the tree never outlives the owner.

``python -m modelfleet_serving.supervisor.guard [options] -- COMMAND...`` with the read end of a pipe as
standard input. When the owner is gone, however it went, the pipe ends and the guard ends the tree: SIGTERM,
a short grace, SIGKILL. As *child subreaper* it becomes the parent of every descendant whose own parent
ended, so that a process can't get away by changing its session or process group.

Why not ``PR_SET_PDEATHSIG`` alone: it fires when the *thread* that forked ends, it doesn't reach
grandchildren, and the owner's other threads come and go. The guard has one thread, so the process that it
starts has that signal as well, against a guard that is killed itself.

It is a daemon (forks twice): an owner that ends its own children first, as a Ray worker does, must not
kill the guard before it has done its work.

It speaks to its owner in lines of JSON on standard output: ``{"started": PID}``, then ``{"code": N}`` or
``{"signal": N}`` once the whole tree is gone, or ``{"error": MESSAGE}``. The owner may write lines:
``signal N`` sends a signal to the started process alone, ``end SECONDS`` ends the tree with that grace.

Nothing but the standard library is imported: it starts in a few dozen milliseconds and takes little memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CHUNK = 65536
_RESCAN_SECONDS = 0.05
_LIBC = ctypes.CDLL(None, use_errno=True)


class RotatingLog:
    """A log file of bounded size: ``PATH``, and what was before it in ``PATH.1``."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def write(self, data: bytes) -> None:
        """Append; a full disk loses lines, not the process."""
        try:
            if self._size and self._size + len(data) > self._max_bytes:
                os.replace(self._path, self._path + ".1")  # noqa: PTH105  pathlib would double the start time
                os.close(self._file)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._size = 0
            self._size += os.write(self._file, data)
        except OSError:
            self._size = 0


def descendants(root: int) -> list[int]:
    """Process ids below ``root``, without those that ended and wait to be reaped."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                # The name in parentheses may hold anything, also parentheses.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue  # ended meanwhile
        if state not in (b"Z", b"X"):
            children.setdefault(int(parent), []).append(int(name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


class Guard:
    """One run of one command."""

    def __init__(self, command: Sequence[str], log: RotatingLog | None, grace: float) -> None:
        self._command = list(command)
        self._log = log
        self._grace = grace
        self._selector = selectors.DefaultSelector()
        self._child = 0
        self._status: int | None = None
        self._kill_at: float | None = None
        """Set once the tree is being ended."""
        self._orders = b""

    def run(self) -> int:
        """Run the command until its whole tree is gone."""
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._end(self._grace))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        output = self._start()
        self._tell({"started": self._child})
        self._selector.register(wake_read, selectors.EVENT_READ, lambda: os.read(wake_read, _CHUNK))
        self._selector.register(0, selectors.EVENT_READ, self._read_orders)
        if output is not None:
            os.set_blocking(output, False)
            self._selector.register(output, selectors.EVENT_READ, lambda: self._copy(output))
        while not self._finished():
            for key, _ in self._selector.select(self._wait_seconds()):
                key.data()
            self._reap()
            self._press()
        if output is not None:
            self._copy(output)
        return self._exit_code()

    def _start(self) -> int | None:
        """Fork and execute the command in a session of its own; gives the read end of its output."""
        read, write = os.pipe2(os.O_CLOEXEC) if self._log is not None else (None, None)
        guard = os.getpid()
        self._child = os.fork()
        if self._child:
            if write is not None:
                os.close(write)
            return read
        try:
            os.setsid()
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != guard:
                os._exit(1)  # the guard ended before the line above
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(write if write is not None else null, 1)
            os.dup2(write if write is not None else null, 2)
            os.execvp(self._command[0], self._command)  # noqa: S606  the command that we are asked to run
        except OSError as error:
            os.write(2, f"{self._command[0]}: {error.strerror}\n".encode())
        os._exit(127)

    def _read_orders(self) -> None:
        data = os.read(0, _CHUNK)
        if not data:  # the owner is gone
            self._selector.unregister(0)
            self._end(self._grace)
            return
        *lines, self._orders = (self._orders + data).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            if word == b"signal" and self._status is None:
                os.kill(self._child, int(value))
            elif word == b"end":
                self._end(float(value))

    def _end(self, grace: float) -> None:
        """Begin to end the tree; a second call may only shorten the grace."""
        kill_at = time.monotonic() + grace
        if self._kill_at is None:
            self._kill_at = kill_at
            self._signal_all(signal.SIGTERM)
        self._kill_at = min(self._kill_at, kill_at)

    def _press(self) -> None:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._child:
                self._status = status
                self._end(self._grace)  # what it left behind

    def _finished(self) -> bool:
        return self._status is not None and not descendants(os.getpid())

    def _wait_seconds(self) -> float | None:
        return None if self._kill_at is None else _RESCAN_SECONDS

    def _copy(self, output: int) -> None:
        assert self._log is not None  # noqa: S101
        while True:
            try:
                data = os.read(output, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                if output in self._selector.get_map():
                    self._selector.unregister(output)
                return
            self._log.write(data)

    def report(self) -> None:
        """Tell the owner how the command ended."""
        assert self._status is not None  # noqa: S101  run() comes first
        if os.WIFSIGNALED(self._status):
            self._tell({"signal": os.WTERMSIG(self._status)})
        else:
            self._tell({"code": os.WEXITSTATUS(self._status)})

    def _exit_code(self) -> int:
        """As a shell gives it."""
        assert self._status is not None  # noqa: S101
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else 128 - code

    @staticmethod
    def _tell(message: dict[str, object]) -> None:
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except OSError:
            return  # the owner is gone, which standard input tells as well


def _remove(folder: str) -> None:
    import shutil  # noqa: PLC0415  takes a third of the start time, and few need it

    shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="guard", description="Run a command that ends with its owner.")
    parser.add_argument("--grace", type=float, default=1.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--log", help="file for the output of the command; without it, none is kept")
    parser.add_argument("--log-bytes", type=int, default=16 * 2**20, help="size at which it is rotated")
    parser.add_argument("--remove", help="folder to delete once the tree is gone")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    if os.fork():
        os._exit(0)
    os.setsid()
    try:
        log = RotatingLog(options.log, options.log_bytes) if options.log else None
        guard = Guard(options.command, log, options.grace)
        code = guard.run()
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    if options.remove:
        _remove(options.remove)
    guard.report()
    return code


if __name__ == "__main__":
    sys.exit(main())
