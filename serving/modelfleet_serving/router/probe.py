"""Active health checks of engines that no request has tried lately."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from modelfleet_serving.router.health import Failure
from modelfleet_serving.router.slices import Slices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelfleet_serving.router.table import EndpointRef
    from modelfleet_serving.router.worker import Worker

_log = logging.getLogger(__name__)

MAX_CONCURRENT: Final = 16
TIMEOUT: Final = 2.0
_STATUS_BYTES: Final = 12
"""Of an answer's beginning, up to its status; nothing else of it is read."""


class Prober:
    """Asks idle engines for their health, so that a request isn't the first to find one gone.

    An engine with requests in flight needs no check: they tell more. A failed check counts as a failed
    attempt; a good one counts for nothing, since an engine may be healthy and still fail requests.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._interval = worker.settings.health_interval
        self._path = worker.settings.health_path

    async def run(self) -> None:
        """Checks until cancelled; each engine once an interval, the workers of a router in turn."""
        counters = self._worker.counters
        if self._interval <= 0:
            return
        while True:
            await asyncio.sleep(self._interval * counters.workers)
            endpoints = iter(await self._idle_endpoints())
            async with asyncio.TaskGroup() as group:
                # Not a task for each: ten thousand of them would hold all requests up.
                for _ in range(MAX_CONCURRENT):
                    group.create_task(self._check(endpoints))

    async def _idle_endpoints(self) -> list[EndpointRef]:
        total = self._worker.counters.total
        found: list[EndpointRef] = []
        slices = Slices()
        for model in tuple(self._worker.table.models.values()):
            found += [
                endpoint
                for variant in model.variants.values()
                for endpoint in variant.endpoints
                if endpoint.ready and endpoint.limit and not total(endpoint.row)
            ]
            await slices.pause()
        return found

    async def _check(self, endpoints: Iterator[EndpointRef]) -> None:
        for endpoint in endpoints:
            failure = await self._ask(endpoint)
            if failure is not None and endpoint.ready:
                self._worker.dispatcher.failed(endpoint, failure)

    async def _ask(self, endpoint: EndpointRef) -> Failure | None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(TIMEOUT):
                tls = self._worker.connector.tls() if endpoint.tls else None
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=tls)
                path = endpoint.path + self._path.encode("ascii")
                head = b"GET " + path + b" HTTP/1.1\r\nhost: " + endpoint.authority
                writer.write(head + b"\r\nconnection: close\r\n\r\n")
                line = await reader.readexactly(_STATUS_BYTES)
        except TimeoutError:
            return Failure.TIMEOUT
        except OSError:
            return Failure.CONNECT
        except asyncio.IncompleteReadError:
            return Failure.BROKEN
        finally:
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.transport.abort()
        return Failure.STATUS if line[9:10] == b"5" or not line.startswith(b"HTTP/1.") else None
