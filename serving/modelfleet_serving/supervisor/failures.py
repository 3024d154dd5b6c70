"""Why an engine ended, from its exit and the end of its log: stable reasons, messages for people."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Final

from modelfleet_serving.supervisor.engine_process import Exit

TAIL_LINES: Final = 20
_MESSAGE_BYTES: Final = 6000

# In the order in which they are tried: the cause before what follows from it.
_PATTERNS: Final = (
    ("PortInUse", re.compile(r"address already in use|errno 98\b", re.IGNORECASE)),
    (
        "OutOfMemory",
        re.compile(
            r"out of memory|OutOfMemoryError|MemoryError|cannot allocate memory|"
            r"no available memory for the cache blocks|available KV cache memory .* is (?:less|negative)|"
            r"larger than the available KV cache memory|Free memory on device .* is less than",
            re.IGNORECASE,
        ),
    ),
    (
        "ModelNotFound",
        re.compile(
            r"RepositoryNotFoundError|RevisionNotFoundError|GatedRepoError|"
            r"is not a local folder and is not a valid model identifier|can't load the configuration of|"
            r"invalid repository id or local directory|does not appear to have a file named",
            re.IGNORECASE,
        ),
    ),
    (
        "BadArguments",
        re.compile(r"^(?:usage:|.*\berror: (?:unrecognized arguments|argument --|the following arg))"),
    ),
    (
        "ModelUnsupported",
        re.compile(
            r"Model architectures .* (?:are|is) not supported|unsupported architecture", re.IGNORECASE
        ),
    ),
)


def classify(end: Exit, lines: Sequence[str]) -> str:
    """A stable reason in CamelCase."""
    for reason, pattern in _PATTERNS:
        if any(pattern.search(line) for line in lines):
            return reason
    if end.signal == signal.SIGKILL or end.code == 128 + signal.SIGKILL:
        return "OutOfMemory" if _kernel_killed(lines) else "EngineKilled"
    return "EngineExited"


def describe(what: str, lines: Sequence[str]) -> str:
    """A message with the last lines of the log."""
    if not lines:
        return f"{what}; it logged nothing"
    text = "\n".join(lines[-TAIL_LINES:])[-_MESSAGE_BYTES:]
    return f"{what}; the last lines of its log:\n{text}"


def _kernel_killed(lines: Sequence[str]) -> bool:
    """Shells and launchers say so of a child that the kernel killed for its memory."""
    return any(re.search(r"oom-kill|oom_kill|^Killed$", line) for line in lines)
