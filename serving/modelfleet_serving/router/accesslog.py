"""The access log: one JSON line a request, written by a thread in batches."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from modelfleet_serving.router.observe import LogEntry

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange

_log = logging.getLogger(__name__)

MAX_WAITING: Final = 200_000
"""Lines that wait for a slow disk; further ones are dropped and counted."""


class AccessLog:
    """Collects lines on the data path, and writes them elsewhere."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop) -> None:
        """``path`` is a file that is appended to, or ``-`` for standard output."""
        self._loop = loop
        self._encoder = msgspec.json.Encoder()
        self._waiting: list[LogEntry] = []
        self._dropped = 0
        self._writing: asyncio.Future[None] | None = None
        if path == "-":
            self._fd = os.dup(sys.stdout.fileno())
        else:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def record(self, exchange: Exchange, status: int, seconds: float) -> None:
        """Notes a finished request."""
        if len(self._waiting) >= MAX_WAITING:
            self._dropped += 1
            return
        request = exchange.request
        endpoint = exchange.endpoint
        reply = exchange.reply
        usage = reply.usage if reply is not None else None
        waited = reply.first_byte if reply is not None else None
        self._waiting.append(
            LogEntry(
                int(time.time() * 1e3) / 1e3,
                exchange.client.peer,
                request.method.decode("latin-1"),
                request.path.decode("latin-1"),
                status,
                int(seconds * 1e4) / 1e4,
                exchange.request_id.decode("latin-1"),
                exchange.target.name if exchange.routed else "",
                endpoint.variant.name if endpoint is not None else "",
                endpoint.id if endpoint is not None else "",
                exchange.fallback_from or "",
                exchange.salt,
                int(waited * 1e4) / 1e4 if waited is not None else None,
                exchange.attempts,
                usage[0] if usage is not None else 0,
                usage[1] if usage is not None else 0,
            )
        )

    def flush(self) -> None:
        """Hands what waits to a thread, unless that still writes."""
        if self._waiting and (self._writing is None or self._writing.done()):
            lines, self._waiting = self._waiting, []
            self._writing = self._loop.run_in_executor(None, self._write, lines)
        if self._dropped:
            _log.warning("the access log is too slow: %d lines dropped", self._dropped)
            self._dropped = 0

    def _write(self, lines: list[LogEntry]) -> None:
        data = self._encoder.encode_lines(lines)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            _log.error("the access log: %s; %d lines lost", error, len(lines))

    async def close(self) -> None:
        """Writes the rest."""
        if self._writing is not None:
            await self._writing
        if self._waiting:
            self._write(self._waiting)
        os.close(self._fd)
