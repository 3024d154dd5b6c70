"""Waiting for something slow without leaving what is quick undone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def attend(
    work: Coroutine[Any, Any, _T], wake: asyncio.Event, serve: Callable[[], Awaitable[None]]
) -> _T:
    """Wait for ``work``; call ``serve`` each time that ``wake`` is set meanwhile.

    Both end together: ``work`` is cancelled when ``serve`` fails, and ``serve`` is never cut short.

    Args:
        work: what is waited for.
        wake: cleared before each call of ``serve``.
        serve: what is done meanwhile.
    """
    task = asyncio.create_task(work)
    try:
        while True:
            waiting = asyncio.create_task(wake.wait())
            try:
                await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if task.done():
                return task.result()
            wake.clear()
            await serve()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
