"""``python -m modelfleet_serving.router``: the router as a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Final

from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.event_loop import run
from modelfleet_serving.router.hub import Hub
from modelfleet_serving.router.process import LOG_FORMAT, tune_collector
from modelfleet_serving.router.settings import Settings, SettingsError, parse_settings, split_address
from modelfleet_serving.router.sources import FileSource, RegistrySource
from modelfleet_serving.router.supervisor import process_id, reserve_port, running
from modelfleet_serving.router.table import TableError
from modelfleet_serving.router.tls import check_files
from modelfleet_serving.router.tracing import check_installed
from modelfleet_serving.router_native import available

_log = logging.getLogger(__name__)

_SWITCH_SECONDS: Final = 0.0005
"""A thread that reads a large table gives way to the event loop this often (default: 5 ms)."""


async def serve(settings: Settings) -> None:
    """Runs until it is told to stop, then drains."""
    check_files(settings)
    if settings.otlp_endpoint:
        check_installed()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    counters = Counters(settings.workers)
    hub = Hub(counters, settings.router_id or process_id())
    if settings.routes:
        source: FileSource | RegistrySource = FileSource(Path(settings.routes), hub.apply)
        await source.start()
    else:
        token = Path(settings.token_file) if settings.token_file else None
        source = RegistrySource(settings.registry, token, settings.router_id or process_id(), hub)
    host, port = split_address(settings.listen)
    with reserve_port(host, port) as reserved:
        port = reserved.getsockname()[1]
        following = loop.create_task(source.run())
        try:
            async with running(settings, hub, host, port):
                _announce(settings, host, port)
                stopping = loop.create_task(stop.wait())
                await asyncio.wait((stopping, following), return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if following.done():
                    # Without its table's source a router would serve old routes for ever: drain, and fail.
                    following.result()
        finally:
            following.cancel()
            counters.close()


def _announce(settings: Settings, host: str, port: int) -> None:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    _log.info("listening on %s (data path %s)", address, "compiled" if available() else "interpreted")
    if settings.port_file:
        path = Path(settings.port_file)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(address + "\n")
        fresh.replace(path)


def main() -> int:
    """Entry point; returns the exit status."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    tune_collector()
    try:
        settings = parse_settings(sys.argv[1:])
        logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
        run(serve(settings), tls=bool(settings.tls_certificate) and settings.workers == 1)
    except (SettingsError, TableError, OSError) as error:
        print(f"modelfleet router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
