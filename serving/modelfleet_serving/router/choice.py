"""Chooses variant and replica of a request.

Interface::

    # when the table changes (a few µs a variant); both are immutable views
    pool = Pool(endpoints, revision_weights, start=rng.random())
    plan = VariantPlan(variants_by_name, weights, fallback, start=rng.random())
    # when an endpoint's state, health or capacity changes: pool.refresh()

    load = SharedLoadView(cells, reading, workers)    # two shared counters a row: see LoadView
    selector = Selector(load, random.Random(), PrefixAffinity(load, random.Random(), table))
    session = session_key(header) if header else None
    order = plan.order(pin, session)              # once a request: chosen variant first, then fallbacks
    for variant in order:                         # again on each retry and each release from the queue
        endpoint = selector.pick(variant.pool, prompt=prompt, session=session, exclude=tried)
        if endpoint is not None:
            cells[endpoint.cell] += 1             # count before dispatch
            # and count unread_kib(...) as pending until the first byte of the answer
            break

**Variant.** A pin takes that variant alone. Otherwise the weights decide, exactly over time. When the chosen
variant has no replica with room, whether for its state or its load, the fallbacks are tried in their order.

**Revision.** While a rollout has revision weights, the request draws its revision; when none of that
revision has room, the others that have a weight take it. Revisions without a weight get nothing.

**Replica.** Of up to eight the least loaded one, of more the better of two random ones. Load is what runs
and what waits to be read, counted by all workers together, so nobody herds. Replicas of different capacity
compare by share of it. For prompts with affinity see :mod:`modelfleet_serving.router.affinity`. A session
goes to the first replica in its order on a hash ring that is within the margin above the least load. Where
replicas say which adapters they have loaded, only those that have a request's adapter count.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final, Generic, TypeVar

from xxhash import xxh3_64_intdigest

from modelfleet_serving.router.affinity import Fingerprint, LoadView, PrefixAffinity
from modelfleet_serving.router.policy.group import UNLIMITED, Group, R, Replica
from modelfleet_serving.router.policy.load import FULL
from modelfleet_serving.router.policy.split import Split

__all__ = ["UNLIMITED", "Group", "Pool", "Replica", "Selector", "Split", "VariantPlan", "session_key"]

_SCAN: Final = 8
_GOLDEN: Final = 0.6180339887498949
_ODD: Final = 0x9E37_79B9_7F4A_7C15
V = TypeVar("V")


def session_key(header: bytes, salt: int = 0) -> int:
    """Key of a session header's value; ``salt`` keeps tenants apart."""
    return xxh3_64_intdigest(header, salt)


def _independent(session: int | None) -> int | None:
    """A session's key for the revision: not the one that its variant was drawn by."""
    return None if session is None else session * _ODD % 2**64


class VariantPlan(Generic[V]):
    """Which variants serve a model's next request, in order.

    Args:
        variants: By name.
        weights: By name; variants that aren't named get nothing. Without any weight above 0 all are equal.
        fallback: Names in order; unknown ones are left out.
        start: 0..1, random for each worker.
    """

    __slots__ = ("_orders", "_pinned", "_split")

    def __init__(
        self, variants: Mapping[str, V], weights: Mapping[str, float], fallback: Sequence[str], start: float
    ) -> None:
        drawn = {name: weight for name, weight in weights.items() if weight > 0 and name in variants}
        if not drawn:
            drawn = dict.fromkeys(variants, 1)
        self._orders: list[tuple[V, ...]] = [
            tuple(
                variants[name]
                for name in dict.fromkeys((first, *fallback))  # each once, the first one first
                if name in variants
            )
            for first in drawn
        ]
        self._pinned = {name: (variant,) for name, variant in variants.items()}
        self._split = Split(list(drawn.values()), start) if len(drawn) > 1 else None

    def order(self, pin: str | None = None, session: int | None = None) -> tuple[V, ...]:
        """The variants to try, best first; empty when there is none.

        Each call draws anew, but a session (:func:`session_key`) always gets the same.
        """
        if pin is not None:
            return self._pinned.get(pin, ())
        if self._split is not None:
            return self._orders[self._split.draw(session)]
        return self._orders[0] if self._orders else ()


class Pool(Generic[R]):
    """The replicas of one variant.

    Args:
        replicas: All of them, whatever their state.
        revision_weights: Shares of a rollout; empty spreads over all.
        start: 0..1, random for each worker.
    """

    __slots__ = ("_by_adapter", "_lists_adapters", "_replicas", "_start", "_weights", "groups", "split")

    def __init__(
        self, replicas: Sequence[R], revision_weights: Mapping[str, float] | None = None, start: float = 0.0
    ) -> None:
        self._replicas = list(replicas)
        self._weights = dict(revision_weights or {})
        self._start = start
        self.refresh()

    def refresh(self) -> None:
        """Takes over changed limits, revisions and adapters of its replicas."""
        self.groups, self.split = self._divide(self._replicas)
        self._lists_adapters = any(replica.adapters for replica in self._replicas)
        self._by_adapter: dict[str, tuple[list[Group[R]], Split | None]] = {}

    def _divide(self, replicas: Sequence[R]) -> tuple[list[Group[R]], Split | None]:
        """Groups of usable replicas, with the split between them where there are several."""
        if not self._weights:
            group = Group(replicas)
            return ([group] if group.members else []), None
        groups, weights = [], []
        for revision, weight in self._weights.items():
            group = Group([replica for replica in replicas if replica.revision == revision])
            if weight > 0 and group.members:
                groups.append(group)
                weights.append(weight)
        if len(groups) < 2:
            return groups, None
        # A split that began at the same place after each refresh would favour the same group each time.
        self._start = (self._start + _GOLDEN) % 1.0
        return groups, Split(weights, self._start)

    def candidates(self, adapter: str | None = None) -> tuple[list[Group[R]], Split | None]:
        """The groups that may serve a request, and the split between them."""
        if adapter is None or not self._lists_adapters:
            return self.groups, self.split
        found = self._by_adapter.get(adapter)
        if found is None:
            found = self._divide([replica for replica in self._replicas if adapter in replica.adapters])
            self._by_adapter[adapter] = found
        return found

    @property
    def usable(self) -> bool:
        """Whether any replica may get requests, were it not full."""
        return bool(self.groups)


class Selector:
    """Picks replicas.

    Args:
        load: How busy replicas are.
        rng: Seeded in tests.
        affinity: Needed for requests with a fingerprint.
        absolute: Load, in requests, by which a session's replica may exceed the least loaded one.
        relative: The same as a share of the least load.
    """

    def __init__(
        self,
        load: LoadView,
        rng: random.Random,
        affinity: PrefixAffinity | None = None,
        *,
        absolute: float = 32.0,
        relative: float = 0.5,
    ) -> None:
        self._load = load
        self._random = rng.random
        self._affinity = affinity or PrefixAffinity(load, rng)
        self._absolute = absolute
        self._relative = relative

    def pick(
        self,
        pool: Pool[R],
        *,
        prompt: Fingerprint | None = None,
        session: int | None = None,
        adapter: str | None = None,
        exclude: Sequence[R] = (),
    ) -> R | None:
        """The replica for a request, ``None`` when none has room.

        Args:
            pool: The variant's replicas.
            prompt: With it, replicas that hold the prompt's beginning are preferred.
            session: Key of what the client says belongs together; comes before ``prompt``.
            adapter: The LoRA adapter that is asked for.
            exclude: Replicas that failed this request.
        """
        groups, split = pool.candidates(adapter)
        if not groups:
            return None
        first = 0 if split is None else split.draw(_independent(session))
        found = self._pick_from(groups[first], prompt, session, exclude)
        if found is None and split is not None:
            for index, group in enumerate(groups):
                if index != first and (found := self._pick_from(group, prompt, session, exclude)) is not None:
                    break
        return found

    def _pick_from(
        self, group: Group[R], prompt: Fingerprint | None, session: int | None, exclude: Sequence[R]
    ) -> R | None:
        if exclude:
            group = Group([member for member in group.members if member not in exclude])
            if not group.members:
                return None
        if session is not None:
            return self._for_session(group, session)
        if prompt is None:
            return self._least(group)
        found = self._affinity.choose(group, prompt)
        if found is not None:
            self._affinity.record(prompt)
        return found

    def _least(self, group: Group[R]) -> R | None:
        """The least loaded of few, the better of two random ones of many; any with room if those are full."""
        members = group.members
        count = len(members)
        load = self._load
        if count > _SCAN:
            one = int(self._random() * count)
            other = int(self._random() * (count - 1))
            other += other >= one
            best = one if load.of(group, one) <= load.of(group, other) else other
            if load.of(group, best) < FULL:
                return members[best]
        # Of equally loaded ones it is each one's turn.
        index = group.turn
        best, low = -1, FULL
        for _ in range(count):
            index = index + 1 if index + 1 < count else 0
            found = load.of(group, index)
            if found < low:
                best, low = index, found
        if best < 0:
            return None
        group.turn = best
        return members[best]

    def _for_session(self, group: Group[R], session: int) -> R | None:
        loads = self._load.of_all(group)
        low = min(loads)
        if low == FULL:
            return None
        bound = low + max(self._absolute, self._relative * low)
        return next(group.members[index] for index in group.walk(session) if loads[index] <= bound)
