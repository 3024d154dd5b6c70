"""Reading an engine's load from its Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from modelfleet_serving.contract import EngineLoad


@dataclass(frozen=True)
class LoadMetrics:
    """Sample names of an engine's gauges."""

    running: str
    """Requests in the batch."""
    waiting: str
    """Requests that wait for a place in the batch."""
    kv_cache_usage: str
    """Share of the KV cache in use, 0..1."""


def read_load(exposition: str, metrics: LoadMetrics) -> EngineLoad:
    """The load that a Prometheus text exposition tells of.

    An engine with several schedulers has a sample each: requests add up, and the fullest KV cache
    counts, because that one makes requests wait. A metric that isn't there yet counts as 0.

    Raises:
        ValueError: when the text can't be parsed.
    """
    running = waiting = usage = 0.0
    # The parser costs most of the time, and an engine exposes hundreds of histogram buckets.
    wanted = (metrics.running, metrics.waiting, metrics.kv_cache_usage)
    lines = "\n".join(line for line in exposition.splitlines() if line.startswith(wanted))
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            if sample.name == metrics.running:
                running += sample.value
            elif sample.name == metrics.waiting:
                waiting += sample.value
            elif sample.name == metrics.kv_cache_usage:
                usage = max(usage, sample.value)
    return EngineLoad(running=int(running), waiting=int(waiting), kv_cache_usage=min(max(usage, 0.0), 1.0))
