"""The holding queue: requests of one model that wait for a replica.

Interface::

    queue: HoldingQueue[Exchange] = HoldingQueue(max_requests=1024, max_bytes=256 << 20)

    try:
        priority = parse_priority(header, highest=tenant.priority)      # PriorityError: 400
        exchange.ticket, pushed_out = queue.put(exchange, now=now, deadline=deadline, size=len(body),
                                                tenant=tenant.name, priority=priority, lane=pin)
    except QueueFullError as full: ...                                  # 429, full.retry_after seconds
    for other in pushed_out: ...                                        # 429 as well

    # an endpoint became ready or has room again:
    blocked: set = set()
    while (found := queue.take(choose, now, blocked)) is not None:      # choose(exchange) -> endpoint | None
        exchange, endpoint = found
        ...                                                             # count and send

    queue.remove(exchange.ticket)                                       # its client left
    for exchange in queue.expire(now): ...                              # 504

Within one tenant and class it is first come, first served. Between tenants of a class it is fair: each gets
the same number of turns while it waits, however much it asks for. Between classes the turns are weighted
4:1 a step, so higher ones are served well before lower ones but nobody starves. ``lane`` names what a
request waits for (a pinned variant, an adapter): one that can't be served holds up only its own lane.

The bounds hold always. When the queue is full, a newcomer pushes out the newest request of the tenant that
has most waiting in the lowest class, if that class is lower than its own, or the same and the tenant has at
least two more than its own; otherwise it is refused itself. So a flood of one tenant, or of batch work, can't
take the queue from others.

Everything is O(log tenants), and O(1) for one tenant. About 4 µs from ``put`` to ``take``.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from itertools import count
from typing import Final, Generic, TypeVar

from modelfleet_serving.router.policy.drain_rate import DrainRate
from modelfleet_serving.router.policy.fairness import FairOrder

__all__ = ["HoldingQueue", "PriorityError", "QueueFullError", "Ticket", "parse_priority"]

T = TypeVar("T")
E = TypeVar("E")

LOW: Final = -1
NORMAL: Final = 0
HIGH: Final = 1
_NAMES: Final = {"low": LOW, "normal": NORMAL, "high": HIGH}
_LIMIT: Final = 5
_STEP: Final = 4.0
_LONGEST: Final = 120.0
_UNKNOWN: Final = 5.0


class PriorityError(ValueError):
    """A priority that isn't one."""


class QueueFullError(Exception):
    """There is no place for a request.

    Attributes:
        retry_after: seconds.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def parse_priority(text: str | None, highest: int = NORMAL) -> int:
    """The class of a request: what it asks for, at most what its key allows.

    ``text`` is ``low``, ``normal``, ``high``, or a whole number from -5 to 5 (normal is 0); ``None`` means
    normal.

    Raises:
        PriorityError: with what is allowed.
    """
    if text is None:
        return min(NORMAL, highest)
    asked = _NAMES.get(text.strip().lower())
    if asked is None:
        try:
            asked = int(text)
        except ValueError:
            asked = _LIMIT + 1
        if not -_LIMIT <= asked <= _LIMIT:
            raise PriorityError(f"priority {text[:40]!r} is not low, normal, high or -{_LIMIT}..{_LIMIT}")
    return min(asked, highest)


class Ticket(Generic[T]):
    """A place in the queue.

    Attributes:
        item: what waits.
        since: when it came.
        waiting: whether it still does.
    """

    __slots__ = ("deadline", "item", "lane", "priority", "serial", "since", "size", "tenant", "waiting")

    def __init__(
        self,
        item: T,
        serial: int,
        *,
        since: float,
        deadline: float,
        size: int,
        tenant: str,
        priority: int,
        lane: Hashable,
    ) -> None:
        self.item = item
        self.serial = serial
        self.since = since
        self.deadline = deadline
        self.size = size
        self.tenant = tenant
        self.priority = priority
        self.lane = lane
        self.waiting = True


class _Flow(Generic[T]):
    """What one tenant has waiting in one class, by lane, each in order of arrival."""

    __slots__ = ("count", "lanes")

    def __init__(self) -> None:
        self.count = 0
        self.lanes: dict[Hashable, OrderedDict[int, Ticket[T]]] = {}

    def add(self, ticket: Ticket[T]) -> None:
        self.lanes.setdefault(ticket.lane, OrderedDict())[ticket.serial] = ticket
        self.count += 1

    def discard(self, ticket: Ticket[T]) -> None:
        lane = self.lanes[ticket.lane]
        del lane[ticket.serial]
        self.count -= 1
        if not lane:
            del self.lanes[ticket.lane]

    def oldest(self, blocked: set[Hashable]) -> Ticket[T] | None:
        """The first that isn't in a blocked lane."""
        heads = [next(iter(lane.values())) for key, lane in self.lanes.items() if key not in blocked]
        if len(heads) == 1:
            return heads[0]
        return min(heads, key=lambda ticket: ticket.serial, default=None)

    def newest_but(self, skip: int) -> Ticket[T]:
        """The newest one but for some that are newer still."""
        tickets = (ticket for lane in self.lanes.values() for ticket in lane.values())
        return heapq.nlargest(skip + 1, tickets, key=lambda ticket: ticket.serial)[skip]


class _Class(Generic[T]):
    """The tenants of one class."""

    __slots__ = ("flows", "order")

    def __init__(self) -> None:
        self.order: FairOrder[str] = FairOrder()
        self.flows: dict[str, _Flow[T]] = {}


class HoldingQueue(Generic[T]):
    """Requests of one model that wait.

    Args:
        max_requests: 0 lets nothing wait. May be changed at any time; what waits already stays.
        max_bytes: Of request bodies.

    Attributes:
        size: bytes that wait now.
    """

    __slots__ = (
        "_classes",
        "_count",
        "_deadlines",
        "_drain",
        "_lanes",
        "_order",
        "_serial",
        "max_bytes",
        "max_requests",
        "size",
    )

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.size = 0
        self._count = 0
        self._serial = count()
        self._order: FairOrder[int] = FairOrder()
        self._classes: dict[int, _Class[T]] = {}
        self._lanes: dict[Hashable, int] = {}
        self._deadlines: list[tuple[float, int, Ticket[T]]] = []
        self._drain = DrainRate()

    def __len__(self) -> int:
        return self._count

    def put(
        self,
        item: T,
        *,
        now: float,
        deadline: float,
        size: int = 0,
        tenant: str = "",
        priority: int = NORMAL,
        lane: Hashable = None,
    ) -> tuple[Ticket[T], list[T]]:
        """Takes a request in; returns its ticket and the requests that it pushed out.

        Raises:
            QueueFullError: there is no place, and nothing may be pushed out for it.
        """
        ticket = Ticket(
            item,
            next(self._serial),
            since=now,
            deadline=deadline,
            size=size,
            tenant=tenant,
            priority=priority,
            lane=lane,
        )
        victims = self._victims(ticket)
        if victims is None:
            raise QueueFullError(f"{len(self)} requests are waiting already", self.retry_after(now))
        for victim in victims:
            self._discard(victim)
        members = self._classes.get(priority)
        if members is None:
            members = self._classes[priority] = _Class()
        self._order.add(priority, rank=-priority)
        flow = members.flows.get(tenant)
        if flow is None:
            flow = members.flows[tenant] = _Flow()
            members.order.add(tenant)
        flow.add(ticket)
        self._lanes[lane] = self._lanes.get(lane, 0) + 1
        self.size += size
        self._count += 1
        heapq.heappush(self._deadlines, (deadline, ticket.serial, ticket))
        return ticket, [victim.item for victim in victims]

    def take(self, choose: Callable[[T], E | None], now: float, blocked: set[Hashable]) -> tuple[T, E] | None:
        """The next request that can be served, with what ``choose`` found for it.

        ``blocked`` gathers the lanes for which nothing was found; pass the same set until ``None`` comes.
        ``choose`` must not change the queue.
        """
        while self._count and not blocked.issuperset(self._lanes):
            ticket = self._next(blocked)
            if ticket is None:
                return None
            found = choose(ticket.item)
            if found is None:
                blocked.add(ticket.lane)
                continue
            self._order.serve(ticket.priority, _STEP**-ticket.priority)
            self._classes[ticket.priority].order.serve(ticket.tenant, 1.0)
            self._discard(ticket)
            self._drain.add(now)
            return ticket.item, found
        return None

    def remove(self, ticket: Ticket[T]) -> bool:
        """Frees a place; ``False`` when the ticket has none any more."""
        if not ticket.waiting:
            return False
        self._discard(ticket)
        return True

    def expire(self, now: float) -> list[T]:
        """Takes out the requests whose time is over."""
        expired = []
        heap = self._deadlines
        while heap and (heap[0][0] <= now or not heap[0][2].waiting):
            ticket = heapq.heappop(heap)[2]
            if ticket.waiting:
                self._discard(ticket)
                expired.append(ticket.item)
        return expired

    def clear(self, lanes: Collection[Hashable] | None = None) -> list[T]:
        """Takes out everything, or some lanes, in order of arrival: what they wait for is gone."""
        tickets = sorted(
            (
                ticket
                for _, _, ticket in self._deadlines
                if ticket.waiting and (lanes is None or ticket.lane in lanes)
            ),
            key=lambda one: one.serial,
        )
        for ticket in tickets:
            self._discard(ticket)
        return [ticket.item for ticket in tickets]

    def retry_after(self, now: float) -> float:
        """Seconds until a request that came last would be served, at the rate observed lately; 1..120."""
        rate = self._drain.per_second(now)
        if not rate:
            return _UNKNOWN
        return min(max((len(self) + 1) / rate, 1.0), _LONGEST)

    def lanes(self) -> dict[Hashable, int]:
        """How many wait in each lane."""
        return dict(self._lanes)

    def _next(self, blocked: set[Hashable]) -> Ticket[T] | None:
        classes = self._classes

        def tenant_able(members: _Class[T], tenant: str) -> bool:
            lanes = members.flows[tenant].lanes
            return not blocked or any(lane not in blocked for lane in lanes)

        def class_able(priority: int) -> bool:
            members = classes[priority]
            return not blocked or any(tenant_able(members, tenant) for tenant in members.flows)

        priority = self._order.first(class_able)
        if priority is None:
            return None
        members = classes[priority]
        tenant = members.order.first(lambda key: tenant_able(members, key))
        return None if tenant is None else members.flows[tenant].oldest(blocked)

    def _discard(self, ticket: Ticket[T]) -> None:
        ticket.waiting = False
        members = self._classes[ticket.priority]
        flow = members.flows[ticket.tenant]
        flow.discard(ticket)
        if not flow.count:
            del members.flows[ticket.tenant]
            members.order.drop(ticket.tenant)
            if not members.flows:
                self._order.drop(ticket.priority)
        left = self._lanes[ticket.lane] - 1
        if left:
            self._lanes[ticket.lane] = left
        else:
            del self._lanes[ticket.lane]
        self.size -= ticket.size
        self._count -= 1
        if len(self._deadlines) > 64 + 2 * len(self):
            self._deadlines = [entry for entry in self._deadlines if entry[2].waiting]
            heapq.heapify(self._deadlines)

    def _victims(self, newcomer: Ticket[T]) -> list[Ticket[T]] | None:
        """Whom a newcomer pushes out, ``None`` when it has to go itself."""
        victims: list[Ticket[T]] = []
        waiting, size = len(self) + 1, self.size + newcomer.size
        if waiting <= self.max_requests and size <= self.max_bytes:
            return victims
        # Where the bound fell below what waits already, nobody goes for that: a newcomer takes one place.
        places = max(self.max_requests, self._count)
        if newcomer.size > self.max_bytes or places <= 0:
            return None
        gone: dict[tuple[int, str], int] = {}
        while waiting > places or size > self.max_bytes:
            victim = self._victim(newcomer, gone)
            if victim is None:
                return None
            victims.append(victim)
            key = (victim.priority, victim.tenant)
            gone[key] = gone.get(key, 0) + 1
            waiting -= 1
            size -= victim.size
        return victims

    def _victim(self, newcomer: Ticket[T], gone: dict[tuple[int, str], int]) -> Ticket[T] | None:
        for priority in sorted(self._order):
            if priority > newcomer.priority:
                return None
            flows = self._classes[priority].flows
            left = {tenant: flow.count - gone.get((priority, tenant), 0) for tenant, flow in flows.items()}
            tenant = max(left, key=lambda key: left[key])
            if left[tenant] <= 0:
                continue
            if priority == newcomer.priority and left[tenant] < left.get(newcomer.tenant, 0) + 2:
                return None
            return flows[tenant].newest_but(gone.get((priority, tenant), 0))
        return None
