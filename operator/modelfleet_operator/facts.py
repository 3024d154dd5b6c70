"""What checkpoints and adapters say, read in the background and kept: a slow hub delays nobody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from modelfleet_operator.planner import AdapterFacts, ModelFacts, ModelUnavailable

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS: Final = 15.0
LAST_RETRY_SECONDS: Final = 600.0
AT_ONCE: Final = 4
Known = ModelFacts | AdapterFacts | ModelUnavailable


class FactsSource(Protocol):
    """Reads what checkpoints and adapters say of themselves."""

    async def facts(self, source: str) -> Known:
        """Facts of a model's source or of an adapter's key, or why there are none."""
        ...


@dataclass
class FactsCache:
    """Facts by source.

    Attributes:
        source: reads them.
    """

    source: FactsSource
    _known: dict[str, Known] = field(default_factory=dict)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _listeners: list[Callable[[str], None]] = field(default_factory=list)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call ``listener`` with each source whose facts changed; the result ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def get(self, sources: Iterable[str]) -> dict[str, Known]:
        """What is known now; reading the rest begins."""
        found = {}
        for source in sources:
            if source in self._known:
                found[source] = self._known[source]
            elif source not in self._tasks:
                self._tasks[source] = asyncio.create_task(self._read(source), name=f"facts {source}")
        return found

    async def close(self) -> None:
        """End all reading."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _read(self, source: str) -> None:
        pause = FIRST_RETRY_SECONDS
        while True:
            async with self._slots:
                found = await self._ask(source)
            if found != self._known.get(source):
                self._known[source] = found
                for listener in list(self._listeners):
                    listener(source)
            if not isinstance(found, ModelUnavailable):
                del self._tasks[source]
                return
            # Also what can't pass by itself is looked at again: the checkpoint may have been repaired.
            await asyncio.sleep(pause if found.retryable else LAST_RETRY_SECONDS)
            pause = min(pause * 2, LAST_RETRY_SECONDS)

    async def _ask(self, source: str) -> Known:
        try:
            return await self.source.facts(source)
        except Exception as error:  # a fault of one reader must not leave its deployment unplanned for ever
            log.exception("facts of %s can't be read", source)
            return ModelUnavailable("ReadFailed", f"{source}: {error}", retryable=True)
