"""The router's event loop: asyncio's, on a selector that serves the data path's sockets itself."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, cast

import uvloop

from modelfleet_serving.router.poller import Poller

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DataPathLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop. What is scheduled on it brings its poller back to it."""

    def __init__(self) -> None:
        self.poller = Poller()
        super().__init__(cast("Any", self.poller))
        # The same clock as asyncio's, without a call through Python: it is read for every chunk.
        self.time = time.monotonic  # type: ignore[method-assign]

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's."""
        self.poller.woken = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        self.poller.woken = True
        return super().call_at(when, callback, *args, context=context)


def run(main: Coroutine[Any, Any, T], *, tls: bool = False) -> T:
    """Run a router's process.

    Args:
        main: all of it.
        tls: its listener speaks TLS. uvloop's is faster than asyncio's, and is taken then, as
            it is where there is no epoll.
    """
    own = sys.platform == "linux" and not tls
    with asyncio.Runner(loop_factory=DataPathLoop if own else uvloop.new_event_loop) as runner:
        return runner.run(main)
