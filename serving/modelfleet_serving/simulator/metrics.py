"""Metrics under vLLM's names, so that dashboards and the platform read a simulator like an engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from modelfleet_serving.simulator.engine import Engine

_SECONDS: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
)
_GAPS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of values in buckets; many equal values cost as much as one."""

    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.help = name, help_text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value, ``times`` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, labels: dict[str, str]) -> Metric:
        """As Prometheus wants it: cumulative."""
        total = 0
        buckets = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self.name, self.help, labels=list(labels))
        family.add_metric(list(labels.values()), buckets=buckets, sum_value=self._sum)
        return family


class Metrics(Collector):
    """What an engine counts, read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.inter_token = Histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _GAPS)
        self.end_to_end = Histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)
        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", _SECONDS
        )
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generation_tokens = Histogram("vllm:request_generation_tokens", "Tokens generated.", _TOKENS)
        self.iteration_tokens = Histogram("vllm:iteration_tokens_total", "Tokens of a step.", _TOKENS)
        self.finished: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.rejected = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def exposition(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics with their values now."""
        labels = {"model_name": self._engine.config.model, "engine": "0"}
        yield from self._gauges(labels)
        yield from self._counters(labels)
        for histogram in (
            self.time_to_first_token,
            self.inter_token,
            self.end_to_end,
            self.queue_time,
            self.prompt_tokens,
            self.generation_tokens,
            self.iteration_tokens,
        ):
            yield histogram.family(labels)

    def _gauges(self, labels: dict[str, str]) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        values = {
            "vllm:num_requests_running": ("Requests in the batch.", len(scheduler.running)),
            "vllm:num_requests_waiting": ("Requests in the queue.", len(scheduler.waiting)),
            "vllm:kv_cache_usage_perc": ("Share of the KV cache in use, 0..1.", scheduler.pool.usage),
            "simulator:lag_seconds": ("How far the simulation is behind its clock.", self._engine.lag),
            "simulator:cached_blocks": ("KV blocks that the prefix cache knows.", scheduler.pool.cached),
        }
        for name, (text, value) in values.items():
            family = GaugeMetricFamily(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family
        sleep = GaugeMetricFamily(
            "vllm:engine_sleep_state", "1 in its state.", labels=[*labels, "sleep_state"]
        )
        for state in ("awake", "weights_offloaded", "discard_all"):
            sleep.add_metric([*labels.values(), state], float(self._engine.sleep_state == state))
        yield sleep
        yield from self._infos()

    def _infos(self) -> Iterator[Metric]:
        """Facts as labels, as vLLM shows them."""
        scheduler = self._engine.scheduler
        limits = self._engine.config.limits
        running = {sequence.adapter for sequence in scheduler.running if sequence.adapter}
        waiting = {sequence.adapter for sequence in scheduler.waiting if sequence.adapter}
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lora.add_metric(
            [str(limits.max_loras), ",".join(sorted(running)), ",".join(sorted(waiting))],
            self._engine.wall_clock(),
        )
        yield lora
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache.",
            labels=["block_size", "num_gpu_blocks", "enable_prefix_caching", "engine"],
        )
        cache.add_metric(
            [str(limits.block_size), str(limits.kv_blocks), str(limits.prefix_caching), "0"], 1.0
        )
        yield cache

    def _counters(self, labels: dict[str, str]) -> Iterator[Metric]:
        counters = self._engine.scheduler.counters
        values = {
            "vllm:prompt_tokens": ("Prompt tokens.", counters.prompt_tokens),
            "vllm:generation_tokens": ("Generated tokens.", counters.generated_tokens),
            "vllm:prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                counters.cache_queries,
            ),
            "vllm:prefix_cache_hits": ("Prompt tokens found there.", counters.cache_hits),
            "vllm:num_preemptions": ("Requests that lost their place.", counters.preemptions),
        }
        for name, (text, value) in values.items():
            family = CounterMetricFamily(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success", "Finished requests.", labels=[*labels, "finished_reason"]
        )
        for reason, count in self.finished.items():
            success.add_metric([*labels.values(), reason], count)
        yield success
        rejections = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused by the queue's bound.", labels=list(labels)
        )
        rejections.add_metric(list(labels.values()), self.rejected)
        yield rejections
