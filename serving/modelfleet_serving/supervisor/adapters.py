"""LoRA adapters of a running engine: loaded and unloaded until it has those that are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from modelfleet_serving.contract import Adapter
from modelfleet_serving.engines import EngineAdapter
from modelfleet_serving.supervisor.probes import EngineClient
from modelfleet_serving.supervisor.sources import ModelFetchError, ModelNotFoundError, adapter_directory

_log = logging.getLogger(__name__)

CALL_SECONDS: Final = 120.0
"""An engine reads the adapter's weights, and may have to wait for a step to end."""
RETRY_SECONDS: Final = 30.0
"""What didn't load may do so later: the source was away, or the adapter is being written."""


class Adapters:
    """The adapters of one replica.

    Args:
        engine: how its engine is told.
        environ: where sources are looked up.
        changed: called whenever :attr:`loaded` or :attr:`problems` change.

    Attributes:
        loaded: sources of what the engine has, by name.
        problems: why others are not loaded, by name.
    """

    def __init__(
        self, engine: EngineAdapter, environ: Mapping[str, str], changed: Callable[[], None]
    ) -> None:
        self.loaded: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self._engine = engine
        self._environ = environ
        self._changed = changed
        self._wanted: dict[str, str] = {}
        self._stale: set[str] = set()
        """What the engine may have and shall not, or not from there."""
        self._news = asyncio.Event()

    def want(self, adapters: Sequence[Adapter]) -> None:
        """Replace what the engine shall have."""
        self._wanted = {adapter.name: adapter.source for adapter in adapters}
        self._news.set()

    def forget(self) -> None:
        """The engine has ended, and with it what it had loaded."""
        self.loaded.clear()
        self.problems.clear()
        self._stale.clear()

    async def keep(self, client: EngineClient) -> None:
        """Follow what is wanted, until cancelled."""
        while True:
            self._news.clear()
            await self.update(client)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if self.problems or self._stale else None):
                    await self._news.wait()

    async def update(self, client: EngineClient) -> None:
        """Unload what isn't wanted, or not from there, and load what is missing."""
        wanted = dict(self._wanted)
        gone = {name for name, source in self.loaded.items() if wanted.get(name) != source}
        settled = self.problems.keys() - wanted.keys()
        self._stale |= gone
        for name in gone:
            del self.loaded[name]
        for name in settled:
            del self.problems[name]
        if gone or settled:
            self._changed()  # before they go: routers must not choose us for them
        for name in sorted(self._stale):
            if problem := await client.call(self._engine.unload_adapter(name), CALL_SECONDS):
                _log.warning("adapter %s can't be unloaded: %s", name, problem)
            else:
                self._stale.discard(name)
        for name, source in wanted.items():
            if name not in self.loaded and name not in self._stale:
                await self._load(client, name, source)

    async def _load(self, client: EngineClient, name: str, source: str) -> None:
        try:
            path = await asyncio.to_thread(adapter_directory, source, self._environ)
            self._stale.add(name)  # until its answer is known
            problem = await client.call(self._engine.load_adapter(name, path), CALL_SECONDS)
        except (ModelNotFoundError, ModelFetchError) as error:
            problem = str(error)
        if problem:
            if self.problems.get(name) != problem:
                _log.warning("adapter %s is not loaded: %s", name, problem)
            self.problems[name] = problem
        else:
            self.loaded[name] = source
            self._stale.discard(name)
            self.problems.pop(name, None)
        self._changed()
