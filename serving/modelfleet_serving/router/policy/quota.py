"""What tenants have used: rates, and requests at once.

A rate is one number: the time at which all that was used would be paid off (the generic cell rate
algorithm's theoretical arrival time, ITU-T I.371). It fits an 8-byte cell, so that all workers of a router
can share it through memory. Two workers that write at the same moment lose one of the two charges; the clock
must be the same for all of them, as the monotonic clock of one host is.

What each worker charged is counted as well, in cells of its own: routers tell it to the registry, and share
their limits by it (:mod:`modelfleet_serving.router.shared_limits`).
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_intdigest

from modelfleet_serving.router import wire
from modelfleet_serving.router.digits import write_digits
from modelfleet_serving.router.errors import RequestError

RATES: Final = 3
"""Cells of a tenant: requests, input tokens, output tokens."""
_MINUTE: Final = 60.0
LONGEST: Final = 600.0
"""Most that anybody can owe, in seconds: one huge request must not lock a tenant out for hours."""
_ROUNDING: Final = 1e-4
"""Seconds that sums of many charges may be off."""
_NAMES: Final = (b"requests", b"tokens", b"output-tokens")
"""In OpenAI's header names; output tokens have names of their own."""
_WORDS: Final = ("requests per minute", "input tokens per minute", "output tokens per minute")
_TAG: Final = (1 << 63) - 1
HIGHEST: Final = 10**15
"""A limit above this is a mistake, and its numbers have no room in headers."""
_PRIVATE_ROWS: Final = 1024
_MILLISECONDS: Final = tuple(b"%dms" % number for number in range(1001))


class Limits:
    """What a tenant may use.

    Args:
        name: The tenant's.
        rates: Requests, input tokens and output tokens a minute; ``None`` is no limit.
        concurrency: Requests at once.
    """

    __slots__ = ("charged", "concurrency", "lines", "metered", "name", "rates", "seconds")

    def __init__(
        self,
        name: str,
        rates: tuple[float | None, float | None, float | None],
        concurrency: int | None,
    ) -> None:
        self.name = name
        self.rates = rates
        self.concurrency = concurrency
        self.charged = any(rate is not None for rate in rates)
        self.metered = rates[1] is not None or rates[2] is not None
        """Has to know the tokens that requests use."""
        # Seconds of the allowance that one unit uses up; 0 where there is no limit.
        self.seconds = (_cost(rates[0]), _cost(rates[1]), _cost(rates[2]))
        # Header lines of each rate, up to what is left and up to when it will be all again.
        self.lines = [
            (
                b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: " % (name, rate or 0, name),
                b"\r\nx-ratelimit-reset-%b: " % name,
            )
            for name, rate in zip(_NAMES, rates, strict=True)
        ]


def _cost(per_minute: float | None) -> float:
    return 0.0 if per_minute is None else _MINUTE / per_minute


class TenantRows:
    """Rows of tenants that every worker finds alike: an open hash table in memory that workers share.

    Each row has a tag of its tenant's name. Two workers that claim the same free row for different
    tenants at the same moment are told apart at the next look: the one whose tag was lost moves on.

    Args:
        tags: One a row, zeroed at first.
        rates: ``RATES`` a row.
        running: ``workers`` a row: requests in flight, by worker.
        elsewhere: One a row: requests in flight at other routers.
        charged: ``RATES * workers`` a row: seconds of the allowance charged so far, by rate and worker.
        workers: How many share the memory.
        worker: Which of them this is.
    """

    __slots__ = (
        "_known", "_size", "_worker", "_workers", "charged", "elsewhere", "rates", "running", "tags"
    )  # fmt: skip

    def __init__(
        self,
        tags: memoryview[int],
        rates: memoryview[float],
        running: memoryview[int],
        elsewhere: memoryview[int],
        charged: memoryview[float],
        workers: int = 1,
        worker: int = 0,
    ) -> None:
        self._size = len(tags)
        self._workers = workers
        self._worker = worker
        self._known: dict[str, tuple[int, int]] = {}
        self.tags = tags
        self.rates = rates
        self.running = running
        self.elsewhere = elsewhere
        self.charged = charged

    @classmethod
    def private(cls) -> TenantRows:
        """Rows that nobody else sees."""
        tags, rates, charged = (memoryview(bytearray(_PRIVATE_ROWS * 8 * n)) for n in (1, RATES, RATES))
        running, elsewhere = (memoryview(bytearray(_PRIVATE_ROWS * 4)) for _ in range(2))
        return cls(tags.cast("q"), rates.cast("d"), running.cast("i"), elsewhere.cast("i"), charged.cast("d"))

    def row(self, name: str) -> int:
        """The row of a tenant."""
        known = self._known.get(name)
        if known is not None and self.tags[known[0]] == known[1]:
            return known[0]
        tag = (xxh3_64_intdigest(name.encode()) & _TAG) or 1
        row = self.row_of(tag)
        if self.tags[row] == tag:
            self._known[name] = (row, tag)
        return row

    def row_of(self, tag: int) -> int:
        """The row of a tenant by its tag; somebody else's when all rows are taken."""
        tags = self.tags
        size = self._size
        row = tag % size
        for _ in range(size):
            found = tags[row]
            if not found:
                tags[row] = found = tag
            if found == tag:
                return row
            row = (row + 1) % size
        return tag % size

    def add(self, row: int, change: int) -> None:
        """A request of a row's tenant begins (1) or ends (-1)."""
        self.running[row * self._workers + self._worker] += change

    def charge(self, cell: int, seconds: float) -> None:
        """Counts what was charged to a cell of ``rates``."""
        self.charged[cell * self._workers + self._worker] += seconds

    def charge_quickly(
        self, limits: Limits, row: int, now: float, input_tokens: float, output_tokens: float
    ) -> bytes | None:
        """Charges a request on all three rates, by C; returns its header lines, or ``None`` for no room."""
        units = limits.seconds
        costs = (units[0], units[1] * input_tokens, units[2] * output_tokens)
        lines: bytes | None = wire.charge(
            self.rates, self.charged, row, self._workers, self._worker, now, units, costs, limits.lines
        )
        return lines

    def charged_in_all(self, cell: int) -> float:
        """Seconds charged to a cell of ``rates`` so far, over all workers."""
        start = cell * self._workers
        return sum(self.charged[start : start + self._workers])

    def total(self, row: int) -> int:
        """Requests of a row's tenant in flight, over all workers, and other routers as far as is known."""
        return self.elsewhere[row] + self.here(row)

    def here(self, row: int) -> int:
        """Requests of a row's tenant in flight, over all workers."""
        start = row * self._workers
        running = self.running
        number = 0
        for place in range(start, start + self._workers):
            number += running[place]
        return number


class Lease:
    """A tenant's right to one request. :meth:`settle` it once, when the request ends.

    Attributes:
        headers: ``x-ratelimit-*`` lines of the answer.
    """

    __slots__ = ("_input", "_limits", "_output", "_quotas", "_row", "_settled", "headers")

    def __init__(
        self,
        quotas: Quotas,
        limits: Limits,
        row: int,
        input_tokens: float,
        output_tokens: float,
        headers: bytes,
    ) -> None:
        self._quotas = quotas
        self._limits = limits
        self._row = row
        self._input = input_tokens
        self._output = output_tokens
        self._settled = False
        self.headers = headers

    def settle(self, now: float, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Ends the request, and puts what was used in the place of what was reserved.

        ``None`` keeps the reservation, for answers whose usage is not known. A request that reached no engine
        used 0 and 0.
        """
        if self._settled:
            return
        self._settled = True
        self._quotas.end(
            self._limits,
            self._row,
            now,
            0.0 if input_tokens is None else input_tokens - self._input,
            0.0 if output_tokens is None else output_tokens - self._output,
        )


class Quotas:
    """Use by tenant; outlives every reread of the keys.

    Args:
        rows: Shared by workers that grant one limit together; ``None`` keeps them in this process.
    """

    __slots__ = ("_rows",)

    def __init__(self, rows: TenantRows | None = None) -> None:
        self._rows = rows or TenantRows.private()

    def admit(
        self, limits: Limits, now: float, input_tokens: float = 0.0, output_tokens: float = 0.0
    ) -> Lease:
        """Reserves what a request is expected to use: all of it or nothing.

        Raises:
            RequestError: 429 with the limit, ``Retry-After`` and ``x-ratelimit-*`` headers.
        """
        rows = self._rows
        row = rows.row(limits.name)
        most = limits.concurrency
        if most is not None and rows.total(row) >= most:
            raise RequestError(
                429,
                f"{limits.name!r} has {most} requests running already, its limit",
                code="rate_limit_exceeded",
                retry_after=1.0,
                headers=b"x-ratelimit-limit-concurrency: %d\r\n" % most,
            )
        headers = b""
        if limits.charged:
            headers = self._charge(limits, row, now, input_tokens, output_tokens)
        rows.add(row, 1)
        return Lease(self, limits, row, input_tokens, output_tokens, headers)

    def _charge(
        self, limits: Limits, row: int, now: float, input_tokens: float, output_tokens: float
    ) -> bytes:
        """Charges a request on all three rates, or none; returns the header lines."""
        rows = self._rows
        if wire.charge is not None:
            lines = rows.charge_quickly(limits, row, now, input_tokens, output_tokens)
            if lines is not None:
                return lines
        cells = rows.rates
        base = row * RATES
        requests_cost, input_cost, output_cost = limits.seconds
        input_cost *= input_tokens
        output_cost *= output_tokens
        requests, read, written = (
            owed(cells[base], now),
            owed(cells[base + 1], now),
            owed(cells[base + 2], now),
        )
        units = limits.seconds
        wait = _wait(requests, requests_cost, units[0])
        wait = max(wait, _wait(read, input_cost, units[1]))
        wait = max(wait, _wait(written, output_cost, units[2]))
        if wait > _ROUNDING:
            self._refuse(limits, (requests, read, written), (requests_cost, input_cost, output_cost), wait)
        requests = min(requests + requests_cost, LONGEST)
        read = min(read + input_cost, LONGEST)
        written = min(written + output_cost, LONGEST)
        cells[base] = now + requests
        rows.charge(base, requests_cost)
        if input_cost:
            cells[base + 1] = now + read
            rows.charge(base + 1, input_cost)
        if output_cost:
            cells[base + 2] = now + written
            rows.charge(base + 2, output_cost)
        return _headers(limits, requests, read, written)

    def _refuse(
        self,
        limits: Limits,
        owing: tuple[float, float, float],
        costs: tuple[float, float, float],
        wait: float,
    ) -> None:
        worst = max(range(RATES), key=lambda index: _wait(owing[index], costs[index], limits.seconds[index]))
        raise RequestError(
            429,
            f"{limits.name!r} has reached its limit of {limits.rates[worst]} {_WORDS[worst]}; "
            f"try again in {wait:.1f} s",
            code="rate_limit_exceeded",
            retry_after=wait,
            headers=_headers(limits, *owing),
        )

    def end(self, limits: Limits, row: int, now: float, input_tokens: float, output_tokens: float) -> None:
        """A request ended; charges what it used beyond its reservation, or gives the rest back."""
        self._rows.add(row, -1)
        if limits.metered:
            _, input_cost, output_cost = limits.seconds
            self._correct(row * RATES + 1, now, input_tokens * input_cost)
            self._correct(row * RATES + 2, now, output_tokens * output_cost)

    def _correct(self, cell: int, now: float, seconds: float) -> None:
        if seconds:
            cells = self._rows.rates
            cells[cell] = now + min(owed(cells[cell], now) + seconds, LONGEST)
            self._rows.charge(cell, seconds)


def owed(cell: float, now: float) -> float:
    """Seconds until all is paid off: never negative, nor, should a cell be from another clock, very many."""
    seconds = cell - now
    if seconds <= 0.0:
        return 0.0
    return min(LONGEST, seconds)


def _wait(owing: float, cost: float, unit: float) -> float:
    """Seconds until a charge fits in; 0 when it does or there is no limit.

    A minute's allowance may be used at once; more than it waits for the whole of it.
    """
    if not unit:
        return 0.0
    return owing + (min(_MINUTE, cost)) - _MINUTE


def _headers(limits: Limits, requests: float, read: float, written: float) -> bytes:
    """What is left of each limit, and when all of it will be."""
    units = limits.seconds
    lines = limits.lines
    headers = b""
    if units[0]:
        headers = _lines(lines[0], requests, units[0])
    if units[1]:
        headers += _lines(lines[1], read, units[1])
    if units[2]:
        headers += _lines(lines[2], written, units[2])
    return headers


def _lines(words: tuple[bytes, bytes], owing: float, unit: float) -> bytes:
    return b"".join((words[0], write_digits(_left(owing, unit)), words[1], _duration(owing), b"\r\n"))


def _left(owing: float, unit: float) -> int:
    left = int((_MINUTE - owing + _ROUNDING) / unit)
    return max(0, left)


def _duration(seconds: float) -> bytes:
    """Seconds as clients of OpenAI's headers read them: ``120ms``, ``7.5s``, ``6m0s``."""
    if seconds < 1.0:
        return _MILLISECONDS[int(seconds * 1000.0 + 0.5)]
    if seconds < _MINUTE:
        return b"%.4gs" % seconds
    return b"%dm%ds" % divmod(round(seconds), 60)
