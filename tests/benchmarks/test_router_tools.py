"""The router benchmark's own checks: the tools measure what they say, the ledger finds what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from tests.benchmarks.router import workload
from tests.benchmarks.router.ledger import Entry, Fault, account
from tests.benchmarks.router.native import Engines, load

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the router benchmark needs one"),
]


def entry(ident: str, outcome: str = "ok", *, begin: int = 0, end: int = 10, status: int = 200) -> Entry:
    return Entry(ident, begin, end, outcome, status, 1, "r1", False, "")


CPU = min(os.sched_getaffinity(0))
KILLED = Fault("replica killed", "r1", 100, 200)
DRAINED = Fault("replica drained", "r1", 100, 200)


def test_ledger_counts_every_request_once() -> None:
    result = account([entry("a"), entry("b")], {"a": [0], "b": [0]}, [])
    assert result.complete(arrivals=2)
    assert not result.complete(arrivals=3), "a request without an entry is lost"
    assert not account([entry("a"), entry("a")], {"a": [0]}, []).complete(arrivals=2), "answered twice"


def test_ledger_wants_an_execution_for_every_answer() -> None:
    assert account([entry("a")], {}, []).never_executed == ["a"]


@pytest.mark.parametrize(
    ("taken", "faults", "explained"),
    [
        (entry("a", "http_error", begin=150, end=160, status=503), [KILLED], True),
        (entry("a", "stream_error", begin=50, end=160), [KILLED], True),
        (entry("a", "stream_error", begin=50, end=90), [KILLED], False),
        (entry("a", "stream_error", begin=150, end=160), [DRAINED], False),
        (entry("a", "truncated", begin=150, end=160), [KILLED], False),
        (entry("a", "http_error", begin=150, end=160, status=404), [KILLED], False),
        (entry("a", "wrong", begin=150, end=160), [KILLED], False),
    ],
)
def test_ledger_explains_only_what_the_fault_may_cause(
    taken: Entry, faults: list[Fault], explained: bool
) -> None:
    assert (not account([taken], {"a": [0]}, faults).unexplained) is explained


def test_ledger_tells_retries_from_continuations() -> None:
    met = entry("a", begin=150, end=160)
    assert account([met], {"a": [0, 0]}, [KILLED]).continued == 0
    assert account([met], {"a": [0, 7]}, [KILLED]).continued == 1
    assert account([entry("a")], {"a": [0, 0]}, [KILLED]).repeated_without_fault == ["a"]


def _requests(path: Path, *, chunks: int, stream: bool) -> Path:
    messages = [workload.message("user", workload.mark(chunks) + "hello")]
    return workload.write(path, [workload.Request(workload.chat(messages, max_tokens=chunks, stream=stream))])


def test_generator_verifies_whole_answers(tmp_path: Path) -> None:
    with Engines(1, settings={"verify": 1, "interval_us": 500}) as engines:
        for stream in (False, True):
            requests = _requests(tmp_path / f"requests-{stream}", chunks=5, stream=stream)
            figures = load(engines.ports[0], requests, cpu=CPU, connections=3, duration=0.3, verify=1)
            assert figures["ok"] == figures["arrivals"] > 0
            assert figures["chunks"] == (5 * figures["ok"] if stream else 0)


def test_generator_finds_cut_and_foreign_answers(tmp_path: Path) -> None:
    requests = _requests(tmp_path / "requests", chunks=5, stream=True)
    with Engines(1, settings={"verify": 1, "interval_us": 500, "mode": "cut", "cut_after": 2}) as engines:
        figures = load(engines.ports[0], requests, cpu=CPU, duration=0.2, verify=1)
        assert figures["truncated"] == figures["arrivals"] > 0
        engines.configure(mode="ok", verify=0)  # without it the engine answers with another id
        figures = load(engines.ports[0], requests, cpu=CPU, duration=0.2, verify=1)
        assert figures["wrong"] == figures["arrivals"] > 0
        engines.configure(mode="500")
        figures = load(engines.ports[0], requests, cpu=CPU, duration=0.2, verify=1)
        assert figures["http_error"] == figures["arrivals"] > 0


def test_engine_continues_an_answer_where_it_broke_off(tmp_path: Path) -> None:
    with Engines(1, settings={"verify": 1, "interval_us": 100}) as engines:
        said = " ".join(f"t={0:020d} n={n:06d} i={'0' * 15}7" for n in range(3))
        messages = [
            workload.message("user", f"@i={'0' * 15}7k=000005@"),
            workload.message("assistant", said),
        ]
        body = workload.chat(messages, max_tokens=5, stream=True)
        with socket.create_connection(("127.0.0.1", engines.ports[0]), timeout=5) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        places = [line.split(" n=")[1][:6] for line in text.splitlines() if " n=" in line]
        assert places == ["000003", "000004"]


def test_simulated_engine_holds_prefixes(tmp_path: Path) -> None:
    settings = {"sim": 1, "sim_rate": 1_000_000, "sim_blocks": 64, "sim_itl_us": 100, "sim_overhead_us": 0}
    with Engines(1, settings=settings) as engines:
        rng = workload.random.Random(1)
        shared = workload.text(rng, 512)
        bodies = [
            workload.chat(
                [workload.message("system", shared), workload.message("user", workload.text(rng, 64))],
                max_tokens=1, stream=True,
            )
            for _ in range(2)
        ]  # fmt: skip
        trace = [workload.Request(body, at=0.1 * index, session=index) for index, body in enumerate(bodies)]
        path = workload.write(tmp_path / "trace", trace)
        figures = load(engines.ports[0], path, cpu=CPU, mode="trace", connections=4, duration=5)
        assert figures["ok"] == 2
        (stats,) = engines.stats()
        assert 500 <= stats["cached_tokens"] <= 540, json.dumps(stats)
