"""Engines with an LRU prefix cache in simulated time, and the policies that are compared on them.

An engine prefills one prompt at a time at a fixed rate, less what its cache holds, and then decodes. Only
what matters to routing is modelled: hits, waiting for the prefill of others, and requests in flight.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.unit.router_policies.replicas import Fleet
from xxhash import xxh3_64_intdigest

from modelfleet_serving.router.affinity import LoadView, PrefixAffinity, PrefixTable, fingerprint, prompt_kib
from modelfleet_serving.router.choice import Pool, Selector

TOKEN = 4
CACHE_BLOCK = 128 * TOKEN
PREFILL_RATE = 20_000.0
OVERHEAD = 0.003


@dataclass(frozen=True)
class Arrival:
    at: float
    prompt: bytes
    decode_seconds: float


@dataclass
class Engine:
    cache_blocks: int
    free_at: float = 0.0
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def prefill(self, now: float, prompt: bytes) -> tuple[float, int]:
        """When its first token comes, and how many of its bytes were cached."""
        hit = value = 0
        missing = False
        for start in range(0, len(prompt) - CACHE_BLOCK + 1, CACHE_BLOCK):
            value = xxh3_64_intdigest(prompt[start : start + CACHE_BLOCK], value)
            if value in self.cache and not missing:
                hit += CACHE_BLOCK
            missing = missing or value not in self.cache
            self.cache[value] = None
            self.cache.move_to_end(value)
        while len(self.cache) > self.cache_blocks:
            self.cache.popitem(last=False)
        self.free_at = max(now, self.free_at) + OVERHEAD + (len(prompt) - hit) / TOKEN / PREFILL_RATE
        return self.free_at, hit


@dataclass
class Outcome:
    hit_rate: float
    first_tokens: list[float]
    peak: int

    def quantile(self, share: float) -> float:
        return sorted(self.first_tokens)[int(share * (len(self.first_tokens) - 1))]


Choose = Callable[[Sequence[int], Sequence[int], bytes], tuple[int, int]]
"""Requests in flight and KiB of pending prompts of each engine, and the prompt: to an engine, and the KiB
that it is expected to read."""


def simulate(trace: Sequence[Arrival], choose: Choose, engines: int, cache_tokens: int = 262_144) -> Outcome:
    fleet = [Engine(cache_tokens * TOKEN // CACHE_BLOCK) for _ in range(engines)]
    loads = [0] * engines
    pending = [0] * engines
    events: list[tuple[float, int, int]] = []
    hits = total = peak = 0
    waits = []
    for arrival in trace:
        while events and events[0][0] <= arrival.at:
            _, engine, read = heapq.heappop(events)
            if read:
                pending[engine] -= read
            else:
                loads[engine] -= 1
        chosen, expected = choose(loads, pending, arrival.prompt)
        loads[chosen] += 1
        pending[chosen] += expected
        peak = max(peak, loads[chosen])
        first, hit = fleet[chosen].prefill(arrival.at, arrival.prompt)
        heapq.heappush(events, (first, chosen, expected))
        heapq.heappush(events, (first + arrival.decode_seconds, chosen, 0))
        waits.append(first - arrival.at)
        hits += hit
        total += len(arrival.prompt)
    return Outcome(hits / total, waits, peak)


# --- Policies ---


def random_choice(engines: int, seed: int = 1) -> Choose:
    rng = random.Random(seed)
    return lambda loads, pending, prompt: (rng.randrange(engines), prompt_kib(len(prompt)))


def least_outstanding(engines: int, *, pending_counts: bool = False, seed: int = 1) -> Choose:
    """By the number of requests in flight; with ``pending_counts`` by what waits to be read too."""
    fleet = Fleet(engines)
    load = LoadView(fleet.total, fleet.pending_total if pending_counts else None)
    selector = Selector(load, random.Random(seed))
    pool = Pool(fleet.replicas)

    def choose(loads: Sequence[int], pending: Sequence[int], prompt: bytes) -> tuple[int, int]:
        fleet.loads, fleet.pending = list(loads), list(pending)
        found = selector.pick(pool)
        assert found is not None
        return found.row, prompt_kib(len(prompt))

    return choose


def prefix_affinity(
    engines: int,
    *,
    routers: int = 1,
    shared: bool = True,
    pending_counts: bool = True,
    seed: int = 1,
    **margins: float,
) -> Choose:
    """Ours. Each request comes to a random one of several routers, whose tables are shared or their own."""
    fleet = Fleet(engines)
    load = LoadView(fleet.total, fleet.pending_total if pending_counts else None)
    table = PrefixTable()
    rng = random.Random(seed)
    selectors = []
    for _ in range(routers):
        own = random.Random(rng.random())
        affinity = PrefixAffinity(load, own, table if shared else PrefixTable(), **margins)
        selectors.append(Selector(load, own, affinity))
    pool = Pool(fleet.replicas)

    def choose(loads: Sequence[int], pending: Sequence[int], prompt: bytes) -> tuple[int, int]:
        fleet.loads, fleet.pending = list(loads), list(pending)
        taken = fingerprint(prompt + b"]")
        found = rng.choice(selectors).pick(pool, prompt=taken)
        assert found is not None
        return found.row, prompt_kib(len(prompt) - (taken.held if taken else 0))

    return choose


def radix_tree(
    engines: int, *, threshold: float = 0.3, absolute: int = 64, relative: float = 1.5, block: int = 64
) -> Choose:
    """What cache-aware routers with one approximate radix tree do, with their defaults.

    When loads differ by more than ``absolute`` and by more than the factor ``relative``, the shortest queue.
    Otherwise the engine that the tree has under the longest match if that is more than ``threshold`` of the
    text, else the engine with the smallest part of the tree. The text goes into the tree for the engine
    that was chosen. The tree is kept as its hashed prefixes, ``block`` bytes apart.
    """
    holders: dict[int, dict[int, None]] = {}
    sizes = [0] * engines

    def choose(loads: Sequence[int], pending: Sequence[int], prompt: bytes) -> tuple[int, int]:
        chain = []
        value = 0
        for start in range(0, len(prompt) - block + 1, block):
            value = xxh3_64_intdigest(prompt[start : start + block], value)
            chain.append(value)
        matched, owner = 0, -1
        for depth, value in enumerate(chain):
            if value not in holders:
                break
            matched, owner = depth + 1, next(iter(holders[value]))
        if max(loads) - min(loads) > absolute and max(loads) > relative * min(loads):
            chosen = loads.index(min(loads))
        elif matched * block > threshold * len(prompt):
            chosen = owner
        else:
            chosen = sizes.index(min(sizes))
        for value in chain:
            if chosen not in holders.setdefault(value, {}):
                holders[value][chosen] = None
                sizes[chosen] += block
        return chosen, prompt_kib(len(prompt))

    return choose


# --- Traces ---


def shared_prefix(
    *,
    rate: float,
    seconds: float,
    groups: int = 150,
    users: int = 5,
    shared: int = 6_000,
    own: int = 1_200,
    seed: int = 7,
) -> list[Arrival]:
    """Groups of users with one system prompt each; every user asks again and again."""
    rng = random.Random(seed)
    systems = [rng.randbytes(shared * TOKEN) for _ in range(groups)]
    questions = [[rng.randbytes(own * TOKEN) for _ in range(users)] for _ in range(groups)]
    trace, now = [], 0.0
    while now < seconds:
        now += rng.expovariate(rate)
        group = rng.randrange(groups)
        trace.append(Arrival(now, systems[group] + questions[group][rng.randrange(users)], rng.uniform(1, 5)))
    return trace


def multi_turn(*, rate: float, seconds: float, turns: int = 6, seed: int = 11) -> list[Arrival]:
    """Conversations that start at ``rate`` and grow by an answer and a question a turn."""
    rng = random.Random(seed)
    system = rng.randbytes(800 * TOKEN)
    trace, now = [], 0.0
    while now < seconds:
        now += rng.expovariate(rate)
        prompt, at = system + rng.randbytes(1_000 * TOKEN), now
        for _ in range(turns):
            trace.append(Arrival(at, prompt, rng.uniform(1, 4)))
            prompt += rng.randbytes(rng.randrange(400, 1_200) * TOKEN)
            at += rng.uniform(5, 15)
    return sorted(trace, key=lambda arrival: arrival.at)


def unshared(*, rate: float, seconds: float, seed: int = 13) -> list[Arrival]:
    """Prompts that have nothing in common."""
    rng = random.Random(seed)
    trace, now = [], 0.0
    while now < seconds:
        now += rng.expovariate(rate)
        trace.append(Arrival(now, rng.randbytes(rng.randrange(200, 8_000) * TOKEN), rng.uniform(0.5, 6)))
    return trace


def popular(*, rate: float, seconds: float, seed: int = 17) -> list[Arrival]:
    """One system prompt that everybody has, with questions of their own."""
    rng = random.Random(seed)
    system = rng.randbytes(4_000 * TOKEN)
    trace, now = [], 0.0
    while now < seconds:
        now += rng.expovariate(rate)
        trace.append(Arrival(now, system + rng.randbytes(rng.randrange(200, 800) * TOKEN), rng.uniform(1, 5)))
    return trace
