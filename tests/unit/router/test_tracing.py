"""OpenTelemetry spans, as a collector gets them over OTLP/HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp.web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.unit.router.harness import Harness, answer_status, die, harness, model, post, stream, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}
        self.url = ""

    async def take(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        data = await request.read()
        if request.headers.get("content-encoding") == "gzip":
            raise AssertionError("not asked for")
        export = ExportTraceServiceRequest.FromString(data)
        for spans in export.resource_spans:
            self.resource = attributes(spans.resource)
            for scope in spans.scope_spans:
                self.spans += scope.spans
        return aiohttp.web.Response(body=b"", content_type="application/x-protobuf")


def attributes(entry: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in entry.attributes}


@contextlib.asynccontextmanager
async def traced(**settings: Any) -> AsyncIterator[tuple[Harness, Collector]]:
    """The spans are all there once the router has stopped."""
    collector = Collector()
    app = aiohttp.web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    collector.url = f"http://127.0.0.1:{port}"
    try:
        async with harness(otlp_endpoint=collector.url, **settings) as router:
            yield router, collector
    finally:
        await runner.cleanup()


async def test_a_request_is_a_span_between_client_and_engine() -> None:
    async with traced() as (router, collector):
        engine = await router.engine("r1")
        await router.table(model(bf16=[engine]))
        given = f"00-{TRACE}-{PARENT}-01"
        answer = await router.ask(
            post(model="m:bf16", headers={"traceparent": given, "tracestate": "a=b", "x-request-id": "req-1"})
        )
        assert answer.status == 200
        await router.ask()
        await router.ask(post(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}))
        await router.ask(post(headers={"traceparent": "rubbish"}))
    asked = [request.headers["traceparent"].split("-") for request in engine.requests]
    spans = {span.span_id.hex(): span for span in collector.spans}
    assert len(spans) == 3  # who does not sample is left alone
    first, second, unsampled, fourth = asked
    span = spans[first[2]]
    assert (first[1], span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, TRACE, PARENT)
    assert engine.requests[0].headers["tracestate"] == "a=b"
    assert (unsampled[1], unsampled[3]) == (TRACE, "00")
    for other in (second, fourth):
        assert spans[other[2]].parent_span_id == b""
        assert other[1] != TRACE
    assert collector.resource["service.name"] == "modelfleet-router"
    assert span.name == "POST /v1/chat/completions"
    assert span.kind == 2  # server
    assert span.end_time_unix_nano > span.start_time_unix_nano
    seen = attributes(span)
    assert seen["http.request.method"] == "POST"
    assert seen["url.path"] == "/v1/chat/completions"
    assert seen["http.response.status_code"] == 200
    assert seen["gen_ai.request.model"] == "m"
    assert seen["gen_ai.usage.input_tokens"] == 3
    assert seen["gen_ai.usage.output_tokens"] == 5
    assert seen["modelfleet.variant"] == "bf16"
    assert seen["modelfleet.replica"] == "r1"
    assert seen["modelfleet.request_id"] == "req-1"


async def test_errors_are_spans_too() -> None:
    async with traced() as (router, collector):
        one, two = await router.engine("r1", die), await router.engine("r2", answer_status(500))
        await router.table(model(a=[one, two]))
        assert (await router.ask()).status in (500, 502)
        assert (await router.ask(post(model="nope"))).status == 404
        assert (await router.ask(post(body=b"{"))).status == 400
    failed, *refused = collector.spans
    seen = attributes(failed)
    assert failed.status.code == 2
    assert seen["error.type"] == str(seen["http.response.status_code"])
    assert seen["modelfleet.attempts"] == 2
    assert [attributes(span)["http.response.status_code"] for span in refused] == [404, 400]
    # The client's mistakes are no errors of the server.
    assert [span.status.code for span in refused] == [0, 0]


async def test_a_stream_is_a_span_to_its_end_and_a_client_that_leaves_ends_it() -> None:
    async with traced() as (router, collector):
        await router.table(
            model(a=[await router.engine("r1", stream(*[{"n": n} for n in range(5)], pause=0.01))])
        )
        assert (await router.ask(post(stream=True))).complete
        client = await router.client()
        client.send(post(stream=True))
        await client.head()
        await client.close()
        await until(lambda: not router.worker.active)
    whole, left = collector.spans
    assert whole.end_time_unix_nano - whole.start_time_unix_nano > 40_000_000
    assert attributes(whole)["gen_ai.response.time_to_first_chunk"] < 1
    assert attributes(left)["http.response.status_code"] == 499


async def test_a_collector_that_is_away_holds_up_nothing() -> None:
    before = asyncio.get_running_loop().time()
    async with harness(otlp_endpoint="http://127.0.0.1:9") as router:
        await router.table(model(a=[await router.engine("r1")]))
        for _ in range(20):
            assert (await router.ask()).status == 200
    assert asyncio.get_running_loop().time() - before < 8
