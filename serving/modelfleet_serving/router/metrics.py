"""The Prometheus view of what all workers counted. Labels are names of the route table: bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from modelfleet_serving.router.observe import Histogram, Snapshot

_LABELS: Final = ("model", "variant")
_COUNTERS: Final = {
    "failures": ("modelfleet_router_engine_failures", "Attempts that an engine failed"),
    "retries": ("modelfleet_router_retries", "Attempts on another engine before the first byte"),
    "fallbacks": ("modelfleet_router_fallbacks", "Requests served by a variant that was not the chosen one"),
    "continued": ("modelfleet_router_continued_streams", "Streams that another engine went on with"),
    "ejections": ("modelfleet_router_ejections", "Times that an engine was taken out for its failures"),
    "input_tokens": ("modelfleet_router_input_tokens", "Prompt tokens by the engines' usage figures"),
    "output_tokens": ("modelfleet_router_output_tokens", "Generated tokens by the engines' usage figures"),
}
_HISTOGRAMS: Final = {
    "first_byte": (
        "modelfleet_router_time_to_first_byte_seconds",
        "From the request to the answer's first byte",
    ),
    "gap": ("modelfleet_router_inter_token_seconds", "Between two pieces of a stream of events"),
    "duration": ("modelfleet_router_request_duration_seconds", "From the request to the end of its answer"),
    "queue_wait": ("modelfleet_router_queue_wait_seconds", "Time in the holding queue"),
}


class _SnapshotCollector(Collector):
    def __init__(self, snapshot: Snapshot, in_flight: Iterable[tuple[str, str, int]], workers: int) -> None:
        self._snapshot = snapshot
        self._in_flight = in_flight
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        requests = CounterMetricFamily(
            "modelfleet_router_requests",
            "Finished requests (499: the client left)",
            labels=(*_LABELS, "status"),
        )
        for status, number in sorted(snapshot.refused.items()):
            requests.add_metric(("", "", str(status)), number)
        for stats in snapshot.variants:
            for status, number in sorted(stats.statuses.items()):
                requests.add_metric((stats.model, stats.variant, str(status)), number)
        yield requests
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for stats in snapshot.variants:
                counter.add_metric((stats.model, stats.variant), getattr(stats, field))
            yield counter
        for field, (name, text) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=_LABELS)
            for stats in snapshot.variants:
                values: Histogram = getattr(stats, field)
                histogram.add_metric((stats.model, stats.variant), _buckets(values), values.sum)
            yield histogram
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        running = GaugeMetricFamily("modelfleet_router_in_flight", "Requests at engines", labels=_LABELS)
        for model, variant, number in self._in_flight:
            running.add_metric((model, variant), number)
        yield running
        queued = GaugeMetricFamily(
            "modelfleet_router_queued", "Requests in the holding queue", labels=_LABELS
        )
        for stats in snapshot.variants:
            queued.add_metric((stats.model, stats.variant), stats.queued)
        yield queued
        yield GaugeMetricFamily(
            "modelfleet_router_connections", "Client connections", value=snapshot.connections
        )
        yield GaugeMetricFamily("modelfleet_router_workers", "Worker processes", value=self._workers)


def _buckets(values: Histogram) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, number in zip((*values.bounds, None), values.counts, strict=True):
        total += number
        buckets.append(("+Inf" if bound is None else str(bound), float(total)))
    return buckets


def render(snapshot: Snapshot, in_flight: Iterable[tuple[str, str, int]], workers: int) -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_SnapshotCollector(snapshot, in_flight, workers))
    return generate_latest(registry)
