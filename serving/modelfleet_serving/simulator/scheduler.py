"""Continuous batching as an engine does it, without a clock: what one step runs and how long it takes.

The rules are those of vLLM's V1 scheduler (docs.vllm.ai, "V1 guide"): a step has a budget of tokens; running
requests come first, one token each or the next chunk of their prompt; then waiting ones in order of
arrival, as long as tokens, places and KV blocks last. When blocks run out, the request that came last is
preempted: it loses its blocks and computes them anew later, as far as they aren't still cached.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from modelfleet_serving.simulator.blocks import BlockPool, block_hashes
from modelfleet_serving.simulator.text import TOKENS, advance


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How long a step takes; all times in seconds.

    ``prefill_base`` (when it prefills) + prefill tokens / ``prefill_rate``
    + ``decode_base`` (when it decodes) + decoding sequences * ``decode_per_sequence``
    """

    prefill_base: float
    prefill_rate: float
    """Tokens a second."""
    decode_base: float
    """One step with a single sequence: reading the weights once."""
    decode_per_sequence: float
    """Each further sequence: reading its KV cache."""
    jitter: float = 0.0
    """Standard deviation of a step's time as a share of it."""

    def seconds(self, prefill_tokens: int, decodes: int) -> float:
        """Time of a step."""
        time = 0.0
        if prefill_tokens:
            time += self.prefill_base + prefill_tokens / self.prefill_rate
        if decodes:
            time += self.decode_base + decodes * self.decode_per_sequence
        return time


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a batch."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    block_size: int = 16
    chunked_prefill: bool = True
    prefix_caching: bool = True
    max_loras: int = 1
    max_num_queued: int = 0
    """Waiting requests before new ones are refused; 0 for no bound."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way, or one choice of it."""

    tokens: list[int]
    """The prompt; what is generated is appended."""
    max_tokens: int
    """Tokens to generate; 0 ends after the prompt, as for an embedding."""
    state: int = 0
    """Decides the next token, see :mod:`.text`."""
    script: list[int] | None = None
    """Tokens to say instead of free text; ends with them."""
    adapter: str = ""
    stall_after: int | None = None
    """Generated tokens after which it holds its place and says nothing more."""
    arrival: float = 0.0
    owner: Any = None
    """The caller's; not looked at."""
    prompt_length: int = 0
    computed: int = 0
    cached: int = 0
    """Prompt tokens that came from the cache at the first admission."""
    generated: int = 0
    preemptions: int = 0
    admitted: float | None = None
    finished: bool = False
    aborted: bool = False
    """Taken out before its end: what the running step still made for it is nobody's."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        if self.script is not None:
            self.max_tokens = min(self.max_tokens, len(self.script))

    def next_token(self) -> int:
        """Generates a token."""
        if self.script is not None:
            token = self.script[self.generated]
        else:
            token = TOKENS[self.state >> 56]
            self.state = advance(self.state, (token,))
        self.tokens.append(token)
        self.generated += 1
        return token


@dataclass(slots=True)
class Step:
    """What a step did. Its tokens exist ``seconds`` after it began."""

    seconds: float = 0.0
    outputs: list[tuple[Sequence, int]] = field(default_factory=list)
    """A new token for each sequence that got one."""
    pooled: list[Sequence] = field(default_factory=list)
    """Sequences without output that are done."""
    prefill_tokens: int = 0
    decodes: int = 0
    preempted: int = 0
    admitted: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Counters:
    """Totals since the start, in tokens but for ``preemptions``."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    preemptions: int = 0


class Scheduler:
    """The batch, the queue and the KV cache of one engine."""

    def __init__(self, limits: Limits, speed: Speed, *, seed: int = 0) -> None:
        self.limits = limits
        self.speed = speed
        self.slowdown = 1.0
        self.pool = BlockPool(limits.kv_blocks, caching=limits.prefix_caching)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.counters = Counters()
        self._random = random.Random(seed)  # noqa: S311 - jitter, repeatable on purpose

    def fits(self, prompt: int, generated: int) -> bool:
        """Whether a request of this size can ever run in this KV cache."""
        return prompt + generated <= self.limits.kv_blocks * self.limits.block_size

    def add(self, sequence: Sequence) -> bool:
        """Puts a request into the queue; ``False`` when the queue is full."""
        bound = self.limits.max_num_queued
        if bound and len(self.waiting) >= bound:
            return False
        if self.limits.prefix_caching:
            sequence.hashes = list(
                block_hashes(sequence.tokens, self.limits.block_size, parent=sequence.adapter.encode())
            )
        self.waiting.append(sequence)
        return True

    def abort(self, sequence: Sequence) -> None:
        """Takes a request out, wherever it is; one that isn't there any more is no error."""
        if sequence.finished:
            return
        sequence.aborted = True
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._finish(sequence)

    def step(self, now: float) -> Step:
        """Runs one step that begins at ``now``. It takes no time when there is nothing that can move."""
        step = Step()
        budget = self._continue_running(step)
        if not step.preempted:
            self._admit(step, budget, now)
        seconds = self.speed.seconds(step.prefill_tokens, step.decodes) * self.slowdown
        if self.speed.jitter:
            seconds *= max(0.1, self._random.gauss(1.0, self.speed.jitter))
        step.seconds = seconds
        return step

    def _continue_running(self, step: Step) -> int:
        """One token for each decoding sequence, a chunk for each that prefills; returns the budget left."""
        budget = self.limits.max_num_batched_tokens
        block_size = self.limits.block_size
        index = 0
        done = False
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            index += 1
            missing = len(sequence.tokens) - sequence.computed
            if _stalled(sequence):
                continue
            tokens = min(missing, budget)
            # A decoding sequence needs a block every `block_size` steps only.
            if (missing > 1 or sequence.computed % block_size == 0) and not self._make_room(
                sequence, tokens, step
            ):
                break
            budget -= tokens
            if missing == 1 and sequence.generated:
                step.decodes += 1
            else:
                step.prefill_tokens += tokens
            done |= self._compute(sequence, tokens, step)
        if done:
            self.running = [sequence for sequence in self.running if not sequence.finished]
        return budget

    def _make_room(self, sequence: Sequence, tokens: int, step: Step) -> bool:
        """Blocks for more tokens, taken from the latest arrivals; ``False`` when it was preempted itself."""
        while not self._grow(sequence, tokens):
            victim = self.running.pop()
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        needed = -(-(sequence.computed + tokens) // self.limits.block_size) - len(sequence.blocks)
        if needed <= 0:
            return True
        blocks = self.pool.allocate(needed)
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def _preempt(self, victim: Sequence, step: Step) -> None:
        self.pool.release(victim.blocks)
        victim.blocks = []
        victim.computed = 0
        victim.preemptions += 1
        step.preempted += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(victim)

    def _admit(self, step: Step, budget: int, now: float) -> None:
        skipped: list[Sequence] = []
        adapters = {sequence.adapter for sequence in self.running if sequence.adapter}
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.adapter and len(adapters | {sequence.adapter}) > self.limits.max_loras:
                skipped.append(self.waiting.popleft())
                continue
            tokens = self._start(sequence, budget)
            if not tokens:
                break
            self.waiting.popleft()
            if sequence.adapter:
                adapters.add(sequence.adapter)
            if sequence.admitted is None:
                sequence.admitted = now
                step.admitted.append(sequence)
            budget -= tokens
            step.prefill_tokens += tokens
            if not self._compute(sequence, tokens, step):
                self.running.append(sequence)
        self.waiting.extendleft(reversed(skipped))

    def _start(self, sequence: Sequence, budget: int) -> int:
        """Takes cached and new blocks for a waiting sequence; returns its tokens in this step, 0 for none."""
        length = len(sequence.tokens)
        # The last token is always computed: its output is what comes next.
        usable = sequence.hashes[: (length - 1) // self.limits.block_size]
        blocks = self.pool.take_cached(usable) if self.limits.prefix_caching else []
        cached = len(blocks) * self.limits.block_size
        tokens = length - cached
        if tokens > budget:
            # A prompt longer than a whole step can only be split.
            whole = not self.limits.chunked_prefill and length <= self.limits.max_num_batched_tokens
            tokens = 0 if whole else budget
        sequence.computed, sequence.blocks = cached, blocks
        if not tokens or not self._grow(sequence, tokens):
            self.pool.release(blocks)
            sequence.computed, sequence.blocks = 0, []
            return 0
        if sequence.admitted is None:
            sequence.cached = cached
            self.counters.prompt_tokens += length
            if self.limits.prefix_caching:
                self.counters.cache_queries += length
                self.counters.cache_hits += cached
        return tokens

    def _compute(self, sequence: Sequence, tokens: int, step: Step) -> bool:
        """Moves a sequence on; ``True`` when it is done."""
        before = sequence.computed
        sequence.computed = after = before + tokens
        block_size = self.limits.block_size
        if self.limits.prefix_caching and after // block_size > before // block_size:
            self._remember(sequence, before // block_size, after // block_size)
        if after < len(sequence.tokens):
            return False
        if _stalled(sequence):
            return False
        if sequence.max_tokens == 0:
            step.pooled.append(sequence)
            self._finish(sequence)
            return True
        token = sequence.next_token()
        self.counters.generated_tokens += 1
        step.outputs.append((sequence, token))
        if sequence.generated >= sequence.max_tokens:
            self._finish(sequence)
            return True
        return False

    def _remember(self, sequence: Sequence, first: int, last: int) -> None:
        block_size = self.limits.block_size
        known = len(sequence.hashes)
        if last > known:
            parent = sequence.hashes[-1] if known else sequence.adapter.encode()
            sequence.hashes += block_hashes(
                sequence.tokens[: last * block_size], block_size, parent=parent, start=known * block_size
            )
        for index in range(first, last):
            self.pool.remember(sequence.blocks[index], sequence.hashes[index])

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def sequences(self) -> Iterator[Sequence]:
        """Everything that runs or waits."""
        yield from self.running
        yield from self.waiting


def _stalled(sequence: Sequence) -> bool:
    """Held by a fault, with its next token due."""
    return (
        sequence.stall_after is not None
        and sequence.generated >= sequence.stall_after
        and len(sequence.tokens) - sequence.computed <= 1
    )
