"""How many streams one simulator holds: tokens per second, and whether it keeps its own clock.

Usage: python -m tests.benchmarks.simulator [--streams 2000] [--itl-ms 50] [--tokens 200]

The client is a bare protocol that counts events, in a process of its own. A simulator that falls behind
shows it in ``slowdown``, the time its streams took over the time they should have taken, and in ``lag``, how
late its last step was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

import psutil
import uvloop
from tests.benchmarks.common import Check, Report


class StreamClient(asyncio.Protocol):
    """Sends one streamed chat and counts what comes back."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.request, self.done = request, done
        self.events = 0
        self.first = self.last = 0.0
        self.gaps: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.sent = time.perf_counter()
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        events = data.count(b'"content":" ')
        if events:
            if self.events:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self.events += events
            self.last = now
        if b"data: [DONE]" in data:
            self.transport.close()
            if not self.done.done():
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed before the end"))


async def load(port: int, streams: int, tokens: int) -> list[StreamClient]:
    """Opens all streams, a hundred at a time, and reads them to their end."""
    loop = asyncio.get_running_loop()
    clients = []
    for number in range(streams):
        message = {"role": "user", "content": f"stream {number}"}
        body = json.dumps(
            {"model": "m", "stream": True, "max_tokens": tokens, "messages": [message]}
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        )
        client = StreamClient(head + body, loop.create_future())
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
        clients.append(client)
        if number % 100 == 99:
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), 300)
    return clients


@contextlib.contextmanager
def simulator(*options: str):  # type: ignore[no-untyped-def]
    """A simulator process; yields it and its port."""
    command = [sys.executable, "-m", "modelfleet_serving.simulator", "--model", "m", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on http://127.0.0.1:(\d+)", line):
                yield process, int(found[1])
                return
        raise RuntimeError("the simulator ended before it listened")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--itl-ms", type=float, default=50.0)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    arguments = (f"--decode-base-ms={options.itl_ms}", "--decode-per-sequence-us=0", "--max-num-seqs=4096")
    with simulator(*arguments, "--kv-cache-tokens=2000000") as (process, port):
        usage = psutil.Process(process.pid)
        before = usage.cpu_times()
        began = time.perf_counter()
        clients = uvloop.run(load(port, options.streams, options.tokens))
        elapsed = time.perf_counter() - began
        after = usage.cpu_times()
        lag = metric(port, "simulator:lag_seconds")
        memory = usage.memory_info().rss
    cpu = (after.user + after.system) - (before.user + before.system)
    gaps = sorted(gap for client in clients for gap in client.gaps)
    decode = [(client.last - client.first) / (options.tokens - 1) * 1e3 for client in clients]
    total = options.streams * options.tokens
    figures = {
        "streams": options.streams,
        "itl_ms_asked": options.itl_ms,
        "itl_ms_mean": statistics.mean(decode),
        "gap_ms_p50": gaps[len(gaps) // 2] * 1e3,
        "gap_ms_p99": gaps[int(len(gaps) * 0.99)] * 1e3,
        "tokens_per_second": total / elapsed,
        "cpu_us_per_token": cpu / total * 1e6,
        "rss_mib": memory / 2**20,
        "lag_seconds_at_end": lag,
    }
    report = Report("simulator", f"One simulator, {options.streams} streams", ("figure", "value"))
    for name, value in figures.items():
        report.put(name, value)
        report.rows.append((name, f"{value:.4g}"))
    report.checks = [
        Check("slowdown", statistics.mean(decode) / options.itl_ms, 1.05, at_most=True, unit="times"),
        Check("cpu_share", cpu / elapsed, 0.8, at_most=True, unit="of a core"),
        Check("tokens_lost", total - sum(client.events for client in clients), 0, at_most=True),
    ]
    report.print()
    report.write()
    if not all(check.met for check in report.checks):
        sys.exit("a target was missed")


if __name__ == "__main__":
    main()
