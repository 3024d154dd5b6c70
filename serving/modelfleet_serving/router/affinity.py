"""Prefix affinity: sends a prompt where the engine's cache already holds its beginning, if that is worth it.

Interface::

    load = LoadView(counters.total, pending.total)
    affinity = PrefixAffinity(load, random.Random(), PrefixTable(shared_memory))
    # a request: the raw JSON of its message list, of its tools and system prompt
    seed = seed_of(model, variant, adapter, salt)           # kept for each of them, not made anew
    prompt = fingerprint(peek.messages, seed, before=(peek.tools, peek.system))
    if prompt is not None:
        endpoint = affinity.choose(group, prompt)           # None when all are full
        affinity.record(prompt)                             # at dispatch: a burst stays together
        pending_cells[endpoint.cell] += unread_kib(readable, prompt.size, prompt.held)  # until the first byte

(:class:`modelfleet_serving.router.choice.Selector` does the choosing and recording.)

**The choice** weighs held prompt against load. A replica that holds the share ``f`` of the prompt may be
loaded up to ``f * margin`` above the least loaded one, with ``margin`` the largest of an absolute number of
requests, a share of the least load, and what the held bytes would cost to read; below 4 KB of held prompt it
shrinks further, as there is little to save. Of several the greatest ``f * margin - (load - least)`` wins. So
a conversation stays where it is, a popular system prompt gets a second holder when its first is busy and
keeps the first, and a prompt that nobody holds goes to the least loaded replica, as without affinity.

**Several workers** of one host share the table through shared memory, and decide as one. **Several hosts**
share no table. With ``home`` they agree because each prompt has one: the replica that a consistent hash of
the first block that is new names. It may be loaded by ``home * (1 - f)`` above the least. One host needs
none; several want 16, at some cost for traffic that shares nothing. The registry tells how many there are.

**Cost** with eight replicas, hashing and recording included: 2 KB about 10 µs, 32 KB 20 µs, 220 KB 50 µs.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import Final

from modelfleet_serving.router.policy.fingerprint import BLOCK, Fingerprint, fingerprint, seed_of
from modelfleet_serving.router.policy.group import Group, R
from modelfleet_serving.router.policy.load import (
    FULL,
    READING_KIB,
    LoadView,
    SharedLoadView,
    prompt_kib,
    readable_bytes,
    unread_kib,
)
from modelfleet_serving.router.policy.prefix_table import DEFAULT_BYTES, PrefixTable

__all__ = [
    "BLOCK",
    "DEFAULT_BYTES",
    "Fingerprint",
    "LoadView",
    "PrefixAffinity",
    "PrefixTable",
    "SharedLoadView",
    "fingerprint",
    "prompt_kib",
    "readable_bytes",
    "seed_of",
    "unread_kib",
]

_WORTHWHILE: Final = 4096
"""Bytes of held prompt from which it counts in full."""
_ALL: Final = 16
"""Replicas up to which every one's load is looked at; of more, the holders and a sample."""
_ROUNDS: Final = 3
_READING: Final = 1.0 / (READING_KIB * 1024)
HOME_OF_SEVERAL: Final = 16.0
"""``home`` where several routers share no table."""


class PrefixAffinity:
    """Chooses among replicas by held prefix and load.

    Args:
        load: How busy replicas are.
        rng: Samples from groups of more than 16 replicas.
        table: Shared by all models of the process, or by all processes of a host.
        absolute: Requests by which a holder of the whole prompt may exceed the least loaded replica. In
            simulation 48 has the hits of no bound at all where prefixes are shared; at 64 conversations begin
            to push each other out.
        relative: The same as a share of the least load, for high loads.
        home: Requests by which the home of a new prompt may exceed the least loaded replica.
    """

    def __init__(
        self,
        load: LoadView,
        rng: random.Random,
        table: PrefixTable | None = None,
        *,
        absolute: float = 48.0,
        relative: float = 0.5,
        home: float = 0.0,
    ) -> None:
        self._load = load
        self._random = rng.random
        self.table = table or PrefixTable()
        self._absolute = absolute
        self._relative = relative
        self._home = home

    def shared_by(self, routers: int) -> None:
        """So many routers choose among the same replicas, each with a table of its own."""
        self._home = HOME_OF_SEVERAL if routers > 1 else 0.0

    def choose(self, group: Group[R], prompt: Fingerprint) -> R | None:
        """The replica for a prompt, ``None`` when none has room."""
        count = len(group.members)
        load = self._load
        loads = load.of_all(group) if count <= _ALL else self._sampled(group, prompt)
        low = _least(loads)
        if low == FULL and count > _ALL:
            loads = load.of_all(group)
            low = _least(loads)
        prompt.held = 0
        if low == FULL:
            return None
        best = self._weigh(group, prompt, loads, low)
        prompt.code = group.codes[best]
        return group.members[best]

    def record(self, prompt: Fingerprint) -> None:
        """The chosen replica gets the prompt: from now on it holds it."""
        self.table.record(prompt.hashes, prompt.code)

    def _sampled(self, group: Group[R], prompt: Fingerprint) -> list[float]:
        """Loads of some members: a few random ones, a few that are the same in every process, and holders."""
        count = len(group.members)
        hashes = prompt.hashes
        sample = {int(self._random() * count) for _ in range(_ALL // 4)}
        first_new = len(hashes) - 1
        for block in {first_new, len(hashes) // 2, 0}:
            for code in self.table.holders(hashes[block]):
                if code in group.by_code:
                    sample.add(group.by_code[code])
        sample.update(islice(group.walk(hashes[0]), _ALL // 4))
        loads = [FULL] * count
        for index in sample:
            loads[index] = self._load.of(group, index)
        return loads

    def _worth(self, prompt: Fingerprint, block: int, margin: float) -> float:
        """Requests by which a replica that holds the prompt up to a block may exceed the least loaded one."""
        held = float(prompt.end(block))
        worth = max(margin, held * _READING) * held / prompt.size
        return worth * held / _WORTHWHILE if held < _WORTHWHILE else worth

    def _weigh(self, group: Group[R], prompt: Fingerprint, loads: list[float], low: float) -> int:
        """Index of the replica that gains most over the least loaded one; notes what it holds."""
        by_code = group.by_code
        hashes = prompt.hashes
        margin = max(self._absolute, self._relative * low)
        seen: set[int] = set()
        table = self.table
        stop, members = table.deepest(hashes, len(hashes), by_code, seen)
        best, best_gain, best_block = -1, -1.0, -1
        home, bonus = -1, 0.0
        if self._home > 0.0 and stop + 1 < len(hashes):
            # A prompt with a new part belongs somewhere.
            home = group.first(hashes[stop + 1])
            share = prompt.end(stop) / prompt.size if stop >= 0 else 0.0
            bonus = self._home * (1.0 - share)
            gain = bonus - (loads[home] - low)
            if gain >= 0.0:
                best, best_gain = home, gain
        for _ in range(_ROUNDS):
            if stop < 0:
                break
            worth = self._worth(prompt, stop, margin)
            for index in members:
                gain = worth - (loads[index] - low)
                if index == home:
                    gain += bonus
                if gain >= 0.0 and gain > best_gain:
                    best, best_gain, best_block = index, gain, stop
            # Others hold less: look for them only while they could gain more.
            if not stop or self._worth(prompt, stop - 1, margin) + bonus <= best_gain:
                break
            seen.update(members)
            stop, members = table.deepest(hashes, stop + 1, by_code, seen)
        if best < 0:
            best = _in_turn(group, loads, low)
        if best_block >= 0:
            prompt.held = prompt.end(best_block)
        return best


def _in_turn(group: Group[R], loads: list[float], low: float) -> int:
    """Of the least loaded members the one that has waited longest: engines tell less than they know."""
    index = group.turn
    for _ in loads:
        index = index + 1 if index + 1 < len(loads) else 0
        if loads[index] == low:
            break
    group.turn = index
    return index


def _least(loads: list[float]) -> float:
    least = FULL
    for load in loads:
        if load < least:  # noqa: PLR1730  a call of min() makes objects of both
            least = load
    return least
