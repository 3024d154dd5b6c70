"""``python -m modelfleet_serving.router``: the router as a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

import uvloop

from modelfleet_serving.contract import TableUpdate
from modelfleet_serving.router.counters import Counters, RowAllocator
from modelfleet_serving.router.settings import Settings, SettingsError, parse_settings, split_address
from modelfleet_serving.router.sources import FileSource
from modelfleet_serving.router.table import TableError
from modelfleet_serving.router.worker import Worker

_log = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Runs until it is told to stop, then drains."""
    loop = asyncio.get_running_loop()
    counters = Counters()
    rows = RowAllocator(counters)
    worker = Worker(settings, counters, loop, rows.row)

    async def apply(update: TableUpdate) -> None:
        await worker.take_over(update.models, update.removed, full=update.full)

    source = FileSource(Path(settings.routes), apply)
    await source.start()
    host, port = split_address(settings.listen)
    server = await loop.create_server(
        worker.connection, host, port, backlog=settings.backlog, reuse_port=True
    )
    address = server.sockets[0].getsockname()
    _log.info("listening on %s:%d", address[0], address[1])
    watching = loop.create_task(source.run())
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()
    await worker.drain()
    watching.cancel()
    await worker.close()


def main() -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = parse_settings(sys.argv[1:])
        uvloop.run(serve(settings))
    except (SettingsError, TableError) as error:
        print(f"modelfleet router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
