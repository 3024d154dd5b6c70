"""The engine's clock: runs the scheduler's steps at the times they would end, and hands the tokens out.

There is one loop for all streams, so that thousands of them cost one timer a step.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Final

from modelfleet_serving.simulator.config import Config
from modelfleet_serving.simulator.faults import Fate, Faults, draw
from modelfleet_serving.simulator.metrics import Metrics
from modelfleet_serving.simulator.scheduler import Scheduler, Sequence, Step

CATCH_UP_STEPS: Final = 4
"""Late steps that run before the loop sees to its sockets; what they write goes out together."""
MAX_LAG: Final = 5.0
"""Seconds behind which the clock gives up and goes on from now."""


class Engine:
    """A scheduler in real time."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.scheduler = Scheduler(config.limits, config.speed, seed=config.seed)
        self.metrics = Metrics(self)
        self.sleep_state = "awake"
        self.lag = 0.0
        """Seconds by which the last step came late."""
        self.requests = 0
        self._faults = Faults()
        self._random = random.Random(config.seed)  # noqa: S311 - faults, repeatable on purpose
        self._wake = asyncio.Event()
        self.idle = asyncio.Event()
        """Nothing runs or waits."""
        self.idle.set()
        self.set_faults(config.faults)

    @property
    def faults(self) -> Faults:
        """The faults that are ordered now."""
        return self._faults

    def set_faults(self, faults: Faults) -> None:
        """Orders faults for what comes from now on."""
        self._faults = faults
        self.scheduler.slowdown = faults.slowdown
        self._wake.set()

    def arrive(self) -> Fate:
        """Counts a request and draws its fate."""
        limit = self._faults.die_after_requests
        if limit is not None and self.requests >= limit:
            die()
        self.requests += 1
        return draw(self._faults, self._random)

    def submit(self, sequence: Sequence) -> bool:
        """Queues a sequence; ``False`` when the queue is full.

        Its ``owner`` is called with each generated token, ``token(sequence, token)``, or with
        ``pooled(sequence)`` when nothing is to be generated and the prompt was processed.
        """
        sequence.arrival = time.monotonic()
        if not self.scheduler.add(sequence):
            self.metrics.rejected += 1
            return False
        self.idle.clear()
        self._wake.set()
        return True

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """Ends a sequence before its time."""
        if not sequence.finished:
            self.scheduler.abort(sequence)
            self.finished(sequence, reason)
            self._wake.set()

    def finished(self, sequence: Sequence, reason: str) -> None:
        """Counts a sequence's end."""
        self.metrics.finished[reason] += 1
        self.metrics.end_to_end.observe(time.monotonic() - sequence.arrival)
        self.metrics.prompt_tokens.observe(sequence.prompt_length)
        self.metrics.generation_tokens.observe(sequence.generated)

    def sleep(self, level: int) -> None:
        """Stops all steps. Requests are taken and wait, as an engine's do."""
        self.sleep_state = "weights_offloaded" if level == 1 else "discard_all"

    def wake_up(self) -> None:
        """Goes on where :meth:`sleep` stopped."""
        self.sleep_state = "awake"
        self._wake.set()

    @property
    def busy(self) -> bool:
        """Something runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def wall_clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    async def run(self) -> None:
        """Runs steps until it is cancelled."""
        end = time.monotonic()
        late = 0
        while True:
            if not self.busy:
                self.idle.set()
            if self.sleep_state != "awake" or not self.busy:
                await self._pause()
                end = time.monotonic()
                continue
            step = self.scheduler.step(end)
            if not step.seconds and not step.outputs and not step.pooled:
                # All that runs has stalled, or the queue waits for what has.
                await self._pause()
                end = time.monotonic()
                continue
            end += step.seconds
            delay = end - time.monotonic()
            self.lag = max(0.0, -delay)
            if delay > 0:
                late = 0
                await asyncio.sleep(delay)
            else:
                late += 1
                if late % CATCH_UP_STEPS == 0:
                    await asyncio.sleep(0)
                if -delay > MAX_LAG:
                    end = time.monotonic()
            self._deliver(step, end)

    async def _pause(self) -> None:
        self.lag = 0.0
        self._wake.clear()
        await self._wake.wait()

    def _deliver(self, step: Step, now: float) -> None:
        metrics = self.metrics
        for sequence in step.admitted:
            metrics.queue_time.observe(max(0.0, (sequence.admitted or now) - sequence.arrival))
        if step.decodes:
            metrics.inter_token.observe(step.seconds, step.decodes)
        metrics.iteration_tokens.observe(step.prefill_tokens + step.decodes)
        for sequence, token in step.outputs:
            if sequence.aborted:
                continue
            if sequence.generated == 1:
                metrics.time_to_first_token.observe(max(0.0, now - sequence.arrival))
            sequence.owner.token(sequence, token)
        for sequence in step.pooled:
            self.finished(sequence, "stop")
            sequence.owner.pooled(sequence)
        limit = self._faults.die_after_tokens
        if limit is not None and self.scheduler.counters.generated_tokens >= limit:
            die()


def die() -> None:
    """Ends the process as a crash does: no clean-up, no answer to anyone."""
    os._exit(1)
