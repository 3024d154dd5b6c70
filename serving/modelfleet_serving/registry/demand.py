"""Demand as the routers report it, summed up. Pure."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelfleet_serving.contract import DemandReport, ModelDemand

WINDOW_SECONDS = 60.0

Key = tuple[str, str]
"""Model and variant."""


@dataclass
class _Sums:
    requests: int = 0
    failures: int = 0
    timed: int = 0
    first_byte_seconds: float = 0.0
    """Summed over ``timed`` requests."""

    def add(self, sample: ModelDemand, sign: int) -> None:
        self.requests += sign * sample.requests
        self.failures += sign * sample.failures
        if sample.time_to_first_byte_seconds is not None:
            self.timed += sign * sample.requests
            self.first_byte_seconds += sign * sample.requests * sample.time_to_first_byte_seconds


@dataclass
class Demand:
    """Gauges as each router last told them, and arrivals of the last minute."""

    _gauges: dict[str, list[ModelDemand]] = field(default_factory=dict)
    _samples: deque[tuple[float, ModelDemand]] = field(default_factory=deque)
    _sums: dict[Key, _Sums] = field(default_factory=lambda: defaultdict(_Sums))

    def report(self, report: DemandReport, now: float) -> bool:
        """Take in a router's report; whether it tells anything new."""
        gauges = [m for m in report.models if m.in_flight or m.queued]
        samples = [m for m in report.models if m.requests or m.failures]
        changed = bool(samples) or _levels(gauges) != _levels(self._gauges.get(report.router, ()))
        self._gauges[report.router] = gauges
        for sample in samples:
            self._samples.append((now, sample))
            self._sums[sample.model, sample.variant].add(sample, 1)
        return changed

    def forget(self, router: str) -> None:
        """Its gauges count no longer; what it has reported stays in the minute."""
        self._gauges.pop(router, None)

    def total(self, now: float) -> list[ModelDemand]:
        """Summed over routers, by model and variant, those without any demand left out."""
        self._forget_before(now - WINDOW_SECONDS)
        in_flight: dict[Key, int] = defaultdict(int)
        queued: dict[Key, int] = defaultdict(int)
        for models in self._gauges.values():
            for m in models:
                in_flight[m.model, m.variant] += m.in_flight
                queued[m.model, m.variant] += m.queued
        result = []
        for key in sorted({*in_flight, *queued, *self._sums}):
            sums = self._sums.get(key) or _Sums()
            mean = sums.first_byte_seconds / sums.timed if sums.timed > 0 else None
            result.append(
                ModelDemand(
                    model=key[0],
                    variant=key[1],
                    in_flight=in_flight.get(key, 0),
                    queued=queued.get(key, 0),
                    requests=sums.requests,
                    failures=sums.failures,
                    time_to_first_byte_seconds=mean,
                )
            )
        return result

    def waiting(self) -> frozenset[Key]:
        """What somebody waits for or is served with right now."""
        return frozenset((m.model, m.variant) for models in self._gauges.values() for m in models)

    def _forget_before(self, time: float) -> None:
        while self._samples and self._samples[0][0] <= time:
            _, sample = self._samples.popleft()
            key = (sample.model, sample.variant)
            self._sums[key].add(sample, -1)
            if not self._sums[key].requests and not self._sums[key].failures:
                del self._sums[key]


def _levels(gauges: Iterable[ModelDemand]) -> dict[Key, tuple[int, int]]:
    return {(m.model, m.variant): (m.in_flight, m.queued) for m in gauges}
