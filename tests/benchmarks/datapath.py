"""CPU time of the router's own code for a request, without sockets: ``python -m tests.benchmarks.datapath``.

A real worker with everything on (tenants with limits, access log, prefix affinity) gets the bytes of requests
from transports that only count what is written to them, and engines' answers the same way. What is left out
is what the kernel and uvloop cost, which no change of the router's code makes cheaper. The best of several
rounds counts; nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop
from tests.benchmarks.router import workload
from tests.benchmarks.router.contestants import API_KEY, MODEL, write_routes, write_tenants

from modelfleet_serving.contract import RouteTable
from modelfleet_serving.router import exchange as exchange_module
from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.hub import TableChange
from modelfleet_serving.router.server import ClientConnection
from modelfleet_serving.router.settings import Settings
from modelfleet_serving.router.table import model_keys
from modelfleet_serving.router.upstream import UpstreamConnection
from modelfleet_serving.router.worker import Worker

ANSWER_BODY = (
    b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1730000000,"model":"m","choices":'
    b'[{"index":0,"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":480,"completion_tokens":32,"total_tokens":512}}' % (b"word " * 32)
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(ANSWER_BODY),
    ANSWER_BODY,
)
CONNECTIONS = 32


class CountingTransport:
    """Takes writes, and counts them."""

    def __init__(self) -> None:
        self.writes = 0
        self.last = b""

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.last = data

    def writelines(self, pieces: list[bytes]) -> None:
        self.writes += 1
        self.last = pieces[-1]

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name == "peername" else default

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def request_bytes(size: int, count: int = 16) -> list[bytes]:
    """The benchmark's bodies with the head that its load generator sends."""
    rng = random.Random(size)
    overhead = len(
        workload.chat(
            [workload.message("system", ""), workload.message("user", "")], max_tokens=32, stream=False
        )
    )
    tokens = (size - overhead) // workload.BYTES_PER_TOKEN
    systems = [workload.text(rng, tokens // 4) for _ in range(4)]
    requests = []
    for index in range(count):
        user = workload.text(rng, tokens - tokens // 4)
        messages = [workload.message("system", systems[index % 4]), workload.message("user", user)]
        body = workload.chat(messages, max_tokens=32, stream=False)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8080\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {API_KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


async def start(directory: Path, affinity: str, engines: int) -> Worker:
    """A worker with everything on that knows one model."""
    urls = [f"http://127.0.0.1:{9000 + index}" for index in range(engines)]
    routes = write_routes(directory / "routes.json", urls, affinity=affinity)
    table = msgspec.json.decode(routes.read_bytes(), type=RouteTable)
    settings = Settings(
        tenants=str(write_tenants(directory / "tenants.yaml")), access_log="/dev/null", health_interval=0
    )

    async def scrape() -> bytes:
        return b""

    worker = Worker(settings, Counters(), asyncio.get_running_loop(), scrape)
    rows = {
        key: row for row, key in enumerate((key for model in table.models for key in model_keys(model)), 1)
    }
    await worker.change(TableChange(models=table.models, rows=rows))
    for variant in worker.table.models[MODEL].variants.values():
        for endpoint in variant.endpoints:
            for _ in range(CONNECTIONS):
                connection = UpstreamConnection(endpoint)
                connection.connection_made(cast("Any", CountingTransport()))
                worker.connector.keep(connection)
    return worker


async def measure(affinity: str, size: int, rounds: int, requests: int, engines: int) -> float:
    """Best CPU seconds of one request."""
    with tempfile.TemporaryDirectory() as scratch:
        worker = await start(Path(scratch), affinity, engines)
        clients = []
        for _ in range(CONNECTIONS):
            client = ClientConnection(worker)
            client.connection_made(cast("Any", CountingTransport()))
            clients.append(client)
        bodies = request_bytes(size)
        best = float("inf")
        for _ in range(rounds):
            begin = time.process_time()
            # All clients ask, then all engines answer: 32 requests run at once, as in the benchmark.
            for turn in range(requests // CONNECTIONS):
                waiting = []
                for index, client in enumerate(clients):
                    client.data_received(bodies[(turn + index) % len(bodies)])
                    exchange = client.exchange
                    if exchange is None or exchange.upstream is None:
                        raise RuntimeError(f"not sent: {client.transport.last!r}")  # type: ignore[attr-defined]
                    waiting.append(exchange.upstream)
                for connection in waiting:
                    connection.data_received(ANSWER)
            best = min(best, (time.process_time() - begin) / (requests // CONNECTIONS * CONNECTIONS))
            await asyncio.sleep(0.6)  # the sweep hands the access log over, as it does in real life
        await worker.close()
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=6400)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--sizes", default="2000,32000")
    options = parser.parse_args()
    native = exchange_module.__file__.endswith(".so")
    print(f"data path {'compiled' if native else 'interpreted'}; µs of CPU a request")
    for size in map(int, options.sizes.split(",")):
        figures = []
        for affinity in ("None", "Prefix"):
            seconds = uvloop.run(measure(affinity, size, options.rounds, options.requests, options.engines))
            figures.append(f"affinity {affinity}: {seconds * 1e6:6.1f}")
        print(f"{size:>7} bytes   " + "   ".join(figures))


if __name__ == "__main__":
    main()
