"""Rows 3: clients that leave, clients that read slowly, and a table that changes."""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.router import workload
from tests.benchmarks.router.bench import Bench, Sample
from tests.benchmarks.router.contestants import API_KEY, MODEL, Running, ask
from tests.benchmarks.router.native import Engines
from tests.benchmarks.router.processes import MEBIBYTE

PREFILL_SECONDS = 3.0
FLOOD_BYTES = 520_000_000
READ_BYTES_PER_S = 1_000_000


def measure(bench: Bench) -> None:
    """All three."""
    disconnects(bench)
    slow_reader(bench)
    table_update(bench)


def _send(port: int, *, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(30)
    client.connect(("127.0.0.1", port))
    body = workload.chat([workload.message("user", "hello")], max_tokens=64, stream=True)
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    lines += [f"authorization: Bearer {API_KEY}", f"content-length: {len(body)}", "", ""]
    client.sendall("\r\n".join(lines).encode() + body)
    return client


def disconnects(bench: Bench) -> None:
    """From the client's close during a silent prefill to the close of the upstream connection.

    Measured twice: with the head of the answer already sent, as vLLM and SGLang do before a stream's first
    token, and with an engine that is silent altogether.
    """
    with bench.engines() as engines, bench.running(bench.chosen(), engines) as started:
        for key, early, title in (
            ("disconnect", 1, "client leaves in a prefill"),
            ("disconnect_before_head", 0, "...before the answer's head"),
        ):
            engines.configure(prefill_us=int(PREFILL_SECONDS * 1e6), headers_early=early)
            for router in started:
                bench.say(f"{key}: {router.name}")
                taken = [_disconnect(router, engines) for _ in range(3)]
                late = statistics.median(taken) > (PREFILL_SECONDS - 1) * 1000
                if not late and not bench.quick:
                    taken += [_disconnect(router, engines) for _ in range(7)]
                bench.report.put_series(f"{key}.{router.name}.upstream_close_ms", taken)
                bench.report.put(f"{key}.{router.name}.upstream_close_max_ms", max(taken))
                note = "only when the first token comes" if late else f"max {max(taken):.1f}"
                bench.row(
                    title, router.name, **{"close ms": f"{statistics.median(taken):,.2f}", "note": note}
                )


def _disconnect(router: Running, engines: Engines) -> float:
    before = engines.total("requests"), engines.total("aborted")
    client = _send(router.port)
    _until(lambda: engines.total("requests") > before[0], 10)
    time.sleep(0.15)  # the request is at rest on every side
    began = time.monotonic_ns()
    client.close()
    _until(lambda: engines.total("aborted") > before[1], PREFILL_SECONDS + 5)
    ended = max(int(replica["last_abort_ns"]) for replica in engines.stats())
    return max(0.0, (ended - began) / 1e6)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {seconds:g} s")
        time.sleep(0.02)


def slow_reader(bench: Bench) -> None:
    """Memory while one client reads a 520 MB stream at 1 MB/s."""
    with bench.engines(flood_bytes=FLOOD_BYTES) as engines, bench.running(bench.chosen(), engines) as started:
        for router in started:
            bench.say(f"slow reader: {router.name}")
            growth, taken = _read_slowly(router, engines, 4.0 if bench.quick else 10.0)
            bench.report.put(f"slow_reader.{router.name}.rss_growth_mib", growth)
            bench.report.put(f"slow_reader.{router.name}.taken_from_engine_mib", taken)
            cells = {"RSS MB": f"+{growth:,.1f}", "note": f"took {taken:,.0f} MB from the engine"}
            bench.row("slow reader, 520 MB stream", router.name, **cells)


def _read_slowly(router: Running, engines: Engines, seconds: float) -> tuple[float, float]:
    for _ in range(3):  # code and buffers that are made on first use are no growth
        with _send(router.port) as client:
            got = 0
            while got < 4 * MEBIBYTE:
                got += len(client.recv(65536))
    _until(lambda: engines.total("active") == 0, 10)
    before_bytes, before = engines.total("bytes"), router.process.rss_mib()
    peak = before
    with _send(router.port, receive_buffer=65536) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not client.recv(READ_BYTES_PER_S // 20):
                break
            peak = max(peak, router.process.rss_mib())
            time.sleep(0.05)
    return peak - before, (engines.total("bytes") - before_bytes) / MEBIBYTE


def table_update(bench: Bench) -> None:
    """Longest answer time while tables of 1,000 models with 10,000 endpoints are taken over."""
    with bench.engines() as engines, bench.running(bench.chosen(only=["ours"]), engines) as started:
        requests = workload.bodies(bench.directory / "bodies-table", 2_000)
        for router in started:
            bench.say("table update: 1,000 models, 10,000 endpoints")
            _update(bench, router, engines, requests)


def _update(bench: Bench, router: Running, engines: Engines, requests: Path) -> None:
    routes = router.directory / "routes.json"

    def write(version: int) -> None:
        _write_table(routes, engines.urls, version)

    def taken_over(version: int) -> None:
        _until(lambda: ask(router.port, f"probe-{version}") == 200, 20)

    write(0)
    taken_over(0)
    quiet = _longest(bench, router, requests, 3.0).ms("latency", "max")
    taken: list[float] = []
    for version in range(1, 4 if bench.quick else 8):
        write(version)
        taken.append(_longest(bench, router, requests, 2.0).ms("latency", "max"))
        taken_over(version)
    bench.report.put_series("table_update.pause_ms", taken)
    bench.report.put("table_update.longest_pause_ms", max(taken))
    bench.report.put("table_update.quiet_max_ms", quiet)
    cells = {"p99 ms": f"max {max(taken):.1f}", "note": f"quiet: max {quiet:.1f}"}
    bench.row("table of 10,000 endpoints changes", router.name, **cells)


def _longest(bench: Bench, router: Running, requests: Path, seconds: float) -> Sample:
    return bench.sample(router, router.port, requests, connections=1, duration=seconds)


def _write_table(path: Path, urls: list[str], version: int) -> None:
    """The measured model on real engines; 1,000 others whose endpoints move with each version."""

    def model(name: str, endpoints: list[tuple[str, str]]) -> dict[str, object]:
        served = [{"id": ident, "url": url, "state": "Ready"} for ident, url in endpoints]
        return {"name": name, "weights": {"a": 1}, "variants": [{"name": "a", "endpoints": served}]}

    models = [
        model(
            f"model-{index}",
            [
                (f"m{index}-{version}-{e}", f"http://127.1.{index // 250}.{1 + e}:{20000 + index}")
                for e in range(10)
            ],
        )
        for index in range(1000)
    ]
    real = [(f"r{index}", url) for index, url in enumerate(urls)]
    models += [model(name, real) for name in (MODEL, f"probe-{version}")]
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"models": models}))
    fresh.replace(path)
