"""``python -m modelfleet_serving.simulator.capacity``: how many replicas does this load need?

Runs the simulator's scheduler without its clock: minutes of traffic take seconds. Arrivals are Poisson,
lengths are exponential around their means, and each request goes to the replica with the fewest requests,
as the router does without affinity.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from modelfleet_serving.simulator import cli
from modelfleet_serving.simulator.config import Config, profiles
from modelfleet_serving.simulator.scheduler import Scheduler
from modelfleet_serving.simulator.scheduler import Sequence as Request

PATIENCE: Final = 120.0
"""Seconds at least that the last requests get to end."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Traffic."""

    rate: float
    """Requests a second."""
    prompt_tokens: int
    """Mean length of a prompt, the shared part included."""
    output_tokens: int
    """Mean length of an answer."""
    shared_tokens: int = 0
    """Beginning that all prompts have in common, such as a system prompt."""
    seconds: float = 120.0
    """How long it lasts."""
    seed: int = 0

    def arrivals(self, longest: int) -> Iterator[tuple[float, list[int], int]]:
        """Time, prompt and answer length of each request; ``longest`` bounds the two together."""
        rng = random.Random(self.seed)  # noqa: S311 - a load that can be repeated
        shared = list(range(min(self.shared_tokens, longest // 2)))
        own_mean = max(1, self.prompt_tokens - len(shared))
        now, fresh = 0.0, 1 << 32
        while True:
            now += rng.expovariate(self.rate)
            if now > self.seconds:
                return
            output = min(1 + int(rng.expovariate(1 / self.output_tokens)), longest // 2)
            own = min(1 + int(rng.expovariate(1 / own_mean)), longest - output - len(shared))
            yield now, [*shared, *range(fresh, fresh + own)], output
            fresh += own


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one number of replicas made of a load; times in seconds."""

    replicas: int
    requests: int
    first_token_p50: float
    first_token_p95: float
    gap_p95: float
    """95th percentile over requests of their mean time between tokens."""
    batch: float
    """Mean number of sequences in a decoding step."""
    cache_hits: float
    """Share of the prompt tokens that came from the prefix cache."""
    unfinished: int
    """Requests that had not ended long after the traffic was over."""


def simulate(config: Config, load: Load, replicas: int) -> Outcome:
    """A load on a number of replicas."""
    return _Simulation(config, load, replicas).run()


class _Simulation:
    """Replicas that step side by side, each at the time when its running step ends."""

    def __init__(self, config: Config, load: Load, replicas: int) -> None:
        self._schedulers = [
            Scheduler(config.limits, config.speed, seed=config.seed + n) for n in range(replicas)
        ]
        self._arrivals = load.arrivals(config.max_model_len)
        self._following = next(self._arrivals, None)
        self._end = load.seconds + max(load.seconds, PATIENCE)
        self._requests: list[Request] = []
        self._first: dict[Request, float] = {}
        self._last: dict[Request, float] = {}
        self._decoding_steps = 0
        self._decodes = 0

    def run(self) -> Outcome:
        # The earliest replica moves next.
        clock = [(0.0, number) for number in range(len(self._schedulers))]
        while clock[0][0] < self._end:
            now, number = clock[0]
            self._admit(now)
            heapq.heapreplace(clock, (self._step(number, now), number))
        return self._outcome()

    def _admit(self, now: float) -> None:
        """What has arrived by now goes to the replica with the fewest requests."""
        while self._following is not None and self._following[0] <= now:
            arrival, prompt, output = self._following
            request = Request(prompt, output, arrival=arrival)
            self._requests.append(request)
            target = min(self._schedulers, key=lambda one: len(one.running) + len(one.waiting))
            target.add(request)
            self._following = next(self._arrivals, None)

    def _step(self, number: int, now: float) -> float:
        """One step of a replica; when it ends."""
        step = self._schedulers[number].step(now)
        if not step.seconds:
            # Idle until something arrives; when nothing will, until the end.
            return max(now + 1e-6, self._following[0]) if self._following else self._end
        self._decoding_steps += bool(step.decodes)
        self._decodes += step.decodes
        done = now + step.seconds
        for request, _token in step.outputs:
            self._first.setdefault(request, done)
            self._last[request] = done
        return done

    def _outcome(self) -> Outcome:
        first, last = self._first, self._last
        waits = sorted(first[request] - request.arrival for request in self._requests if request in first)
        gaps = sorted(
            (last[request] - first[request]) / (request.generated - 1)
            for request in self._requests
            if request.generated > 1
        )
        queried = sum(scheduler.counters.cache_queries for scheduler in self._schedulers)
        hits = sum(scheduler.counters.cache_hits for scheduler in self._schedulers)
        return Outcome(
            replicas=len(self._schedulers),
            requests=len(self._requests),
            first_token_p50=percentile(waits, 0.5),
            first_token_p95=percentile(waits, 0.95),
            gap_p95=percentile(gaps, 0.95),
            batch=self._decodes / self._decoding_steps if self._decoding_steps else 0.0,
            cache_hits=hits / queried if queried else 0.0,
            unfinished=sum(not request.finished for request in self._requests),
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; 0 for none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modelfleet_serving.simulator.capacity",
        description="How many replicas does this load need?",
        epilog="Further options are the simulator's own, such as --max-num-seqs or --kv-cache-tokens.",
        allow_abbrev=False,
    )
    parser.add_argument("--profile", choices=sorted(profiles()), required=True)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="mean (default: 1000)")
    parser.add_argument("--answer-tokens", type=int, default=200, help="mean (default: 200)")
    parser.add_argument("--shared-tokens", type=int, default=0, help="common beginning of all prompts")
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the traffic (default: 120)")
    parser.add_argument("--first-token-ms", type=float, default=1000.0, help="target for p95 (default: 1000)")
    parser.add_argument("--gap-ms", type=float, default=100.0, help="target for p95 between tokens")
    parser.add_argument("--max-replicas", type=int, default=32)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each number of replicas until one keeps the targets; 1 when none does."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.rate <= 0 or options.seconds <= 0 or min(options.prompt_tokens, options.answer_tokens) < 1:
        parser.error("--rate, --seconds, --prompt-tokens and --answer-tokens must be above 0")
    config = cli.parse(["--model", "capacity", "--profile", options.profile, *rest])
    load = Load(
        rate=options.rate,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.answer_tokens,
        shared_tokens=options.shared_tokens,
        seconds=options.seconds,
    )
    print("replicas  first token p50    p95  between tokens p95  batch  cached  unfinished")
    for replicas in range(1, options.max_replicas + 1):
        result = simulate(config, load, replicas)
        first, late, gap = (1e3 * s for s in (result.first_token_p50, result.first_token_p95, result.gap_p95))
        print(
            f"{replicas:8}  {first:12.0f} ms {late:6.0f} ms {gap:15.0f} ms {result.batch:6.1f} "
            f"{result.cache_hits:7.0%}  {result.unfinished:10}",
            flush=True,
        )
        if not result.unfinished and late <= options.first_token_ms and gap <= options.gap_ms:
            print(f"{replicas} replicas of {options.profile} are enough (simulated).")
            return 0
    print(f"{options.max_replicas} replicas are not enough.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
