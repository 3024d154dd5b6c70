"""Time of each router policy that stands in the way of a request: ``python -m tests.benchmarks.policies``.

The best of many short runs, which is what the code costs when nothing else disturbs it. Nothing is asserted.
"""

from __future__ import annotations

import json
import random
import timeit
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table
from tests.unit.router_policies.replicas import Fleet

from modelfleet_serving.router.affinity import LoadView, PrefixAffinity, fingerprint
from modelfleet_serving.router.choice import Pool, Selector, VariantPlan
from modelfleet_serving.router.continuation import Recorder, ask_usage, continue_stream, strip_usage
from modelfleet_serving.router.health import Failure, OutlierDetector, Outliers, RetryBudget
from modelfleet_serving.router.holding import HoldingQueue
from modelfleet_serving.router.policy.quota import Quotas
from modelfleet_serving.router.tenants import generate_key, hash_key, parse_keys

Row = tuple[str, Callable[[], object], int]
"""What is timed, the call, and how often it may be called."""

CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1730000000,'
    b'"model":"m","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,'
    b'"finish_reason":null}]}\n\n'
)


def choice_rows(count: int) -> Iterator[Row]:
    fleet = Fleet(count)
    load = LoadView(fleet.total, fleet.pending_total)
    rng = random.Random(1)
    selector = Selector(load, rng, PrefixAffinity(load, rng))
    pool = Pool(fleet.replicas)
    name = f"choice, {count} replicas: "
    yield name + "least loaded", lambda: selector.pick(pool), 20_000
    yield name + "session", lambda: selector.pick(pool, session=12345), 20_000
    for kib in (2, 32, 220):
        data = rng.randbytes(kib * 1024)
        yield (
            name + f"known prompt, {kib} KB",
            lambda data=data: selector.pick(pool, prompt=fingerprint(data)),
            10_000,
        )
        fresh = iter([rng.randbytes(kib * 1024) for _ in range(200)])
        yield (
            name + f"new prompt, {kib} KB",
            lambda it=fresh: selector.pick(pool, prompt=fingerprint(next(it))),
            150,
        )


def holding_rows() -> Iterator[Row]:
    for tenants in (1, 1000):
        queue: HoldingQueue[int] = HoldingQueue(100_000, 0)
        numbers = iter(range(10**9))
        for number in range(tenants):
            queue.put(number, now=0.0, deadline=1e9, tenant=str(number))

        def put_and_take(
            queue: HoldingQueue[int] = queue, numbers: Iterator[int] = numbers, tenants: int = tenants
        ) -> None:
            queue.put(1, now=0.0, deadline=1e9, tenant=str(next(numbers) % tenants))
            queue.take(lambda item: item, 0.0, set())

        def put_and_leave(queue: HoldingQueue[int] = queue) -> None:
            queue.remove(queue.put(1, now=0.0, deadline=1e9, tenant="0")[0])

        yield f"holding, {tenants} tenants: put and take", put_and_take, 10_000
        yield f"holding, {tenants} tenants: put and leave", put_and_leave, 10_000


def tenant_rows() -> Iterator[Row]:
    keys = [generate_key() for _ in range(1000)]
    limits = {"requestsPerMinute": 10**9, "inputTokensPerMinute": 10**9, "outputTokensPerMinute": 10**9}
    entries = [{"name": f"t{n}", "hash": hash_key(key), **limits} for n, key in enumerate(keys)]
    table = parse_keys({"keys.json": json.dumps({"keys": entries}).encode()})
    header = b"Bearer " + keys[500].encode()
    tenant = table.authenticate(header)
    quotas = Quotas()
    yield "tenants: authenticate", lambda: table.authenticate(header), 20_000
    yield (
        "tenants: admit and settle, three limits",
        lambda: quotas.admit(tenant, 1.0, 100, 100).settle(2.0, 90, 80),
        10_000,
    )


def health_rows() -> Iterator[Row]:
    health = OutlierDetector(Outliers(), random.Random(1))
    health.ready = 8
    well, ailing = health.circuit("well"), health.circuit("ailing")
    budget = RetryBudget()
    now = iter(range(10**9))

    def ail() -> None:
        moment = float(next(now))
        health.failed(ailing, Failure.STATUS, moment)
        health.succeeded(ailing, moment)

    yield "health: success of a healthy endpoint", lambda: health.succeeded(well, 1.0), 50_000
    yield "health: sweep with nothing ejected", lambda: health.sweep(1.0), 50_000
    yield "health: failure and success", ail, 20_000
    yield "retry budget: request", lambda: budget.request(1.0), 50_000


def stream_rows() -> Iterator[Row]:
    recorder = Recorder(chunked=True)
    framed = b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK)
    yield "continuation: record a chunk, decoding included", lambda: recorder.add(framed), 20_000
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "x" * 2000}], "stream": True}
    ).encode()
    half = Recorder(chunked=True)
    for _ in range(500):
        half.add(framed)
    got = half.read()
    assert got is not None
    yield (
        "continuation: next request after 500 tokens",
        lambda: continue_stream(True, body, got, source="a", target="b"),
        500,
    )
    splice = continue_stream(True, body, got, source="a", target="b").splice
    yield "continuation: splice a chunk", lambda: splice.feed(CHUNK), 5_000
    yield "usage: ask, 2 KB body", lambda: ask_usage(body, b""), 20_000
    yield "usage: strip from a chunk", lambda: strip_usage(CHUNK), 20_000


def rows() -> Iterator[Row]:
    plan = VariantPlan({"bf16": 1, "awq": 2}, {"bf16": 20, "awq": 80}, ["awq", "bf16"], 0.1)
    yield "choice: draw a variant", plan.order, 50_000
    yield from choice_rows(8)
    yield from choice_rows(64)
    yield from holding_rows()
    yield from tenant_rows()
    yield from health_rows()
    yield from stream_rows()


def microseconds(call: Callable[[], object], calls: int) -> float:
    rounds = 30 if calls >= 3_000 else 3
    each = calls // rounds
    return min(timeit.repeat(call, number=each, repeat=rounds)) / each * 1e6


def main() -> None:
    table = Table("policy", "µs a call", title="Router policies", title_justify="left")
    table.columns[1].justify = "right"
    for name, call, calls in rows():
        table.add_row(name, f"{microseconds(call, calls):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
