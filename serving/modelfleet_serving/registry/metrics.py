"""The registry's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from modelfleet_serving.registry.state import Registry


class RegistryMetrics(Collector):
    """Counters of the server, and gauges read from the registry when somebody asks."""

    def __init__(self, registry: Registry, clock: Callable[[], float], polls: Callable[[], int]) -> None:
        self._registry = registry
        self._clock = clock
        self._polls = polls
        self._collectors = CollectorRegistry()
        self.heartbeats = Counter(
            "modelfleet_registry_heartbeats", "Heartbeats taken in", registry=self._collectors
        )
        self.requests = Counter(
            "modelfleet_registry_requests",
            "HTTP requests answered",
            ["method", "path", "code"],
            registry=self._collectors,
        )
        self._collectors.register(self)

    def collect(self) -> Iterable[Metric]:
        """Gauges of now."""
        registry = self._registry
        replicas = GaugeMetricFamily(
            "modelfleet_registry_replicas", "Replicas with a valid lease", labels=["state"]
        )
        for state, count in registry.endpoint_counts().items():
            replicas.add_metric([state.value], count)
        yield replicas
        restarts = CounterMetricFamily(
            "modelfleet_registry_engine_restarts",
            "Engines that ended or hung and were started again",
            labels=["model", "variant"],
        )
        lost = CounterMetricFamily(
            "modelfleet_registry_replicas_lost",
            "Replicas that ended without a goodbye",
            labels=["model", "variant"],
        )
        for variant, incidents in registry.endpoints.incidents:
            restarts.add_metric([incidents.model, variant], incidents.restarts)
            lost.add_metric([incidents.model, variant], incidents.lost)
        yield restarts
        yield lost
        gauges = {
            "models": ("Models in the route table", len(registry.table)),
            "routes": ("Routes that the operator set", len(registry.routes)),
            "routers": ("Routers that are alive", registry.routers()),
            "polls": ("Open long polls", self._polls()),
            "table_version": ("Version of the route table", registry.table.version),
            "confirmed_version": (
                "Version that every live router has taken over",
                registry.confirmed(self._clock()),
            ),
            "warming": ("1 while it has just started and tells routers nothing", int(registry.warming)),
            "heartbeat_interval_seconds": ("Asked of the replicas", registry.interval),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"modelfleet_registry_{name}", text, value=value)

    def exposition(self) -> tuple[bytes, str]:
        """Prometheus text and its content type."""
        return generate_latest(self._collectors), CONTENT_TYPE_LATEST
