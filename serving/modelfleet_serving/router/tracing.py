"""OpenTelemetry spans, when a collector is configured. Without one, trace headers just pass through."""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING, Any, Final

from modelfleet_serving.router.settings import SettingsError

if TYPE_CHECKING:
    from modelfleet_serving.router.exchange import Exchange

_MISSING: Final = "--otlp-endpoint needs the packages of the extra `tracing`: pip install modelfleet[tracing]"
_EXPORT_SECONDS: Final = 3.0
"""For one batch, retries included: so long may a collector that is away hold up the router's end."""
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def check_installed() -> None:
    """Tells at the start what only the first worker would notice.

    Raises:
        SettingsError: when the OpenTelemetry packages are not installed.
    """
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SettingsError(_MISSING) from error


class Tracing:
    """A server span for each request; the engine gets it as its parent."""

    def __init__(self, endpoint: str) -> None:
        """``endpoint`` is the base URL of an OTLP/HTTP collector.

        Raises:
            SettingsError: when the OpenTelemetry packages are not installed.
        """
        check_installed()
        trace = importlib.import_module("opentelemetry.trace")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        self._trace = trace
        name = os.environ.get("OTEL_SERVICE_NAME", "modelfleet-router")
        resource = resources.Resource.create({"service.name": name})
        self._provider = sdk.TracerProvider(resource=resource)
        exporter = otlp.OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=_EXPORT_SECONDS)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("modelfleet")

    def begin(self, exchange: Exchange) -> Any:
        """Starts a request's span, below the client's where it sent one."""
        trace = self._trace
        parent = None
        found = _TRACEPARENT.fullmatch(exchange.request.special.get(b"traceparent", b""))
        if found is not None:
            context = trace.SpanContext(
                trace_id=int(found[1], 16),
                span_id=int(found[2], 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(int(found[3], 16)),
            )
            parent = trace.set_span_in_context(trace.NonRecordingSpan(context))
        request = exchange.request
        method, path = request.method.decode("latin-1"), request.path.decode("latin-1")
        return self._tracer.start_span(
            f"{method} {path}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": path,
                "modelfleet.request_id": exchange.request_id.decode("latin-1"),
            },
        )

    def header(self, span: Any) -> bytes:
        """The ``traceparent`` line that makes the engine's spans children of this one."""
        context = span.get_span_context()
        flags = int(context.trace_flags)
        return f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}\r\n".encode()

    def end(self, span: Any, exchange: Exchange, status: int) -> None:
        """Ends a request's span."""
        span.set_attribute("http.response.status_code", status)
        if exchange.routed:
            span.set_attribute("gen_ai.request.model", exchange.target.name)
            span.set_attribute("modelfleet.attempts", exchange.attempts)
        reply = exchange.reply
        if reply is not None and reply.first_byte is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", reply.first_byte)
        if reply is not None and reply.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", reply.usage[0])
            span.set_attribute("gen_ai.usage.output_tokens", reply.usage[1])
        if exchange.salt:
            span.set_attribute("modelfleet.tenant", exchange.salt)
        if exchange.fallback_from:
            span.set_attribute("modelfleet.fallback_from", exchange.fallback_from)
        endpoint = exchange.endpoint
        if endpoint is not None:
            span.set_attribute("modelfleet.variant", endpoint.variant.name)
            span.set_attribute("modelfleet.replica", endpoint.id)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Sends what waits."""
        self._provider.shutdown()
