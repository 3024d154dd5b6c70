"""Ends what a test run started when the run itself is gone, however it went.

A program of its own (standard library only), started by `Guard` with a pipe as standard input. Lines on it:
``watch PID``, ``forget PID``, ``remove PATH``. When the pipe closes, or its parent is another process than
at the start, the watched process groups are killed and the paths removed. SIGKILL of the test run closes
the pipe as well as an orderly end does, and unlike PR_SET_PDEATHSIG this needs no Linux, does not depend on
which thread started a process, and removes files too.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    # The terminal's Ctrl-C and a runner's SIGTERM to the group are for the test run; we outlast it.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    parent = os.getppid()
    watched: set[int] = set()
    paths: list[str] = []
    pending = b""
    while os.getppid() == parent:
        # A forked child of the test run may hold the pipe open, hence the look at the parent each second.
        readable, _, _ = select.select([0], [], [], 1.0)
        if not readable:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            verb, _, rest = line.decode().partition(" ")
            if verb == "watch":
                watched.add(int(rest))
            elif verb == "forget":
                watched.discard(int(rest))
            elif verb == "remove":
                paths.append(rest)
    for pid in watched:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for path in paths:
        _remove(path)


def _remove(path: str) -> None:
    # A killed process may still be finishing a write; try again for a moment.
    for _ in range(50):
        shutil.rmtree(path, ignore_errors=True)
        if not Path(path).exists():
            return
        time.sleep(0.1)
    print(f"could not remove {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
