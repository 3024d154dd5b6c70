"""The operator process: ``python -m modelfleet_operator.main`` or ``modelfleet operator``."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from contextlib import AsyncExitStack

import aiohttp
import kopf
from kubernetes.aio.client.api_client import ApiClient

from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.kube import KubeClient, connect
from modelfleet_operator.election import LeadershipLostError, lead
from modelfleet_operator.events import EventWriter
from modelfleet_operator.facts import FactsCache, FactsSource, Known
from modelfleet_operator.fleet import Fleet
from modelfleet_operator.handlers import handlers, kopf_settings
from modelfleet_operator.health import Health, serve
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.logs import set_up_logging
from modelfleet_operator.metrics import LEADER
from modelfleet_operator.pools import Tools
from modelfleet_operator.settings import Settings, SettingsError
from modelfleet_operator.writer import ObjectWriter

log = logging.getLogger(__name__)

FIRST_LIST_SECONDS = 2.0
CONNECTIONS = 64


class _HubOnDemand:
    """The model hub, imported when the first checkpoint is read: its libraries take much memory."""

    def __init__(self) -> None:
        self._hub: FactsSource | None = None

    async def facts(self, source: str) -> Known:
        """Facts of a source, or why there are none."""
        if self._hub is None:
            from modelfleet_operator.clients.model_hub import ModelHub  # noqa: PLC0415

            self._hub = ModelHub()
        return await self._hub.facts(source)


class Operator:
    """One run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._health = Health()

    async def run(self) -> None:
        """Work, or stand by, until SIGTERM.

        Raises:
            LeadershipLostError: another process took over.
        """
        self._catch_signals()
        async with AsyncExitStack() as stack:
            server = await serve(self._health, *self._settings.listen)
            stack.push_async_callback(server.cleanup)
            api = await stack.enter_async_context(await connect())
            if not self._settings.leader_election:
                LEADER.set(1)
                await self._work(api, Leadership())
                return
            await lead(api, self._settings, lambda leadership: self._work(api, leadership), self._stop)

    async def _work(self, api: ApiClient, leadership: Leadership) -> None:
        kube = KubeClient(api)
        async with AsyncExitStack() as stack:
            connector = aiohttp.TCPConnector(limit=CONNECTIONS)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            facts = FactsCache(_HubOnDemand())
            stack.push_async_callback(facts.close)
            events = EventWriter(kube, self._settings.identity)
            writer = ObjectWriter(kube, events)
            fleet = Fleet(Tools(kube, session, facts, writer, self._settings, leadership))
            stack.push_async_callback(fleet.close)
            self._health.fleet = fleet
            await self._first_list(fleet)
            _spare_what_is_kept()
            await self._until_stopped(fleet, writer, events)

    async def _first_list(self, fleet: Fleet) -> None:
        """Nothing is done before everything is known: what nobody asked for is removed."""
        while not self._stop.is_set():
            try:
                await fleet.sync()
            except ClientError as error:
                log.warning("the API server can't be listed: %s", error)
                await asyncio.sleep(FIRST_LIST_SECONDS)
            else:
                return

    async def _until_stopped(self, fleet: Fleet, writer: ObjectWriter, events: EventWriter) -> None:
        tasks = {
            asyncio.create_task(self._stop.wait(), name="stop"),
            asyncio.create_task(writer.run(), name="writer"),
            asyncio.create_task(events.run(), name="events"),
            asyncio.create_task(fleet.run(), name="fleet"),
        }
        watches = asyncio.create_task(self._watch(fleet), name="watches")
        try:
            done, _ = await asyncio.wait({*tasks, watches}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Kopf ends every task that began after it did, so it goes first.
            for task in (watches, *tasks):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for task in done:
            if task.get_name() == "stop":
                continue
            if error := task.exception():
                raise error
            if not self._stop.is_set():
                raise RuntimeError(f"{task.get_name()} ended by itself")

    async def _watch(self, fleet: Fleet) -> None:
        namespaces = self._settings.watch_namespaces
        ours = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=handlers(),
            settings=kopf_settings(),
            memo=fleet,
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )
        self._catch_signals()  # kopf has put its own in their place
        await kopf.run_tasks(tasks, ignored=ours)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)


def _spare_what_is_kept() -> None:
    """Let the garbage collector leave alone what stays, and look less often at what goes by itself.

    Each answer of Ray and of a registry is thousands of objects without cycles: with Python's own settings,
    the search for cycles among all that is kept takes a third of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def run() -> None:
    """Entry point."""
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        sys.exit(f"error: {error}")
    set_up_logging(settings.log_level)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        asyncio.run(Operator(settings).run())
    except LeadershipLostError as error:
        sys.exit(f"leadership lost: {error}")


if __name__ == "__main__":
    run()
