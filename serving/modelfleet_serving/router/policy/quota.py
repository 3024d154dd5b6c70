"""What tenants have used: rates, and requests at once.

A rate is one number: the time at which all that was used would be paid off (the generic cell rate
algorithm's theoretical arrival time, ITU-T I.371). It fits an 8-byte cell, so that all workers of a router
can share it through memory. Two workers that write at the same moment lose one of the two charges; the clock
must be the same for all of them, as the monotonic clock of one host is.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from typing import Final, Protocol

from modelfleet_serving.router.errors import RequestError

RATES: Final = 3
"""Cells of a tenant: requests, input tokens, output tokens."""
_MINUTE: Final = 60.0
_LONGEST: Final = 600.0
"""Most that anybody can owe, in seconds: one huge request must not lock a tenant out for hours."""
_ROUNDING: Final = 1e-4
"""Seconds that sums of many charges may be off."""
_LINES: Final = tuple(
    b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
    % (name, name, name)
    for name in (b"requests", b"tokens", b"output-tokens")
)
_WORDS: Final = ("requests per minute", "input tokens per minute", "output tokens per minute")


class Limits(Protocol):
    """What a tenant may use; ``None`` is no limit."""

    @property
    def name(self) -> str:
        """The tenant's."""

    @property
    def rates(self) -> tuple[float | None, float | None, float | None]:
        """Requests, input tokens and output tokens a minute."""

    @property
    def concurrency(self) -> int | None:
        """Requests at once."""


class InFlight(Protocol):
    """Counts of requests in flight by tenant, over all workers."""

    def add(self, name: str, change: int) -> None:
        """A request of a tenant begins (1) or ends (-1)."""

    def total(self, name: str) -> int:
        """Requests of a tenant in flight."""


class LocalInFlight:
    """Counts of this process alone."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, change: int) -> None:
        """A request of a tenant begins (1) or ends (-1)."""
        left = self._counts.get(name, 0) + change
        if left:
            self._counts[name] = left
        else:
            self._counts.pop(name, None)

    def total(self, name: str) -> int:
        """Requests of a tenant in flight."""
        return self._counts.get(name, 0)


def _paid_off(cell: float, now: float) -> float:
    """A cell's value at a moment: never in the past, nor, should it be from another clock, far ahead."""
    return min(cell, now + _LONGEST) if cell > now else now


def _after(paid_off: float, per_minute: float, amount: float, now: float) -> float:
    """The cell once so much was used; a negative amount gives it back."""
    return min(paid_off + amount / per_minute * _MINUTE, now + _LONGEST)


class Lease:
    """A tenant's right to one request. :meth:`settle` it once, when the request ends.

    Attributes:
        headers: ``x-ratelimit-*`` lines of the answer.
    """

    __slots__ = ("_limits", "_quotas", "_reserved", "_settled", "headers")

    def __init__(
        self, quotas: Quotas, limits: Limits, reserved: tuple[float, float, float], headers: bytes
    ) -> None:
        self._quotas = quotas
        self._limits = limits
        self._reserved = reserved
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
        _, reserved_input, reserved_output = self._reserved
        self._quotas.end(
            self._limits,
            now,
            0.0 if input_tokens is None else input_tokens - reserved_input,
            0.0 if output_tokens is None else output_tokens - reserved_output,
        )


class Quotas:
    """Use by tenant; outlives every reread of the keys.

    Args:
        cells: Doubles, zeroed, ``RATES`` a row, which workers may share; ``None`` keeps them in this process:
            then every worker grants the whole limit.
        row_of: Row of a tenant, the same in every worker that shares ``cells``.
        in_flight: Shared where the workers share it.
    """

    def __init__(
        self,
        cells: MutableSequence[float] | memoryview[float] | None = None,
        row_of: Callable[[str], int] | None = None,
        in_flight: InFlight | None = None,
    ) -> None:
        if (cells is None) != (row_of is None):
            raise ValueError("cells and row_of belong together")
        self._own: list[float] = []
        self._rows: dict[str, int] = {}
        self._cells: MutableSequence[float] | memoryview[float] = self._own if cells is None else cells
        self._row_of = row_of or self._own_row
        self._in_flight = in_flight or LocalInFlight()

    def _own_row(self, name: str) -> int:
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = len(self._rows)
            self._own.extend([0.0] * RATES)
        return row

    def admit(
        self, limits: Limits, now: float, input_tokens: float = 0.0, output_tokens: float = 0.0
    ) -> Lease:
        """Reserves what a request is expected to use: all of it or nothing.

        Raises:
            RequestError: 429 with the limit, ``Retry-After`` and ``x-ratelimit-*`` headers.
        """
        amounts = (1.0, input_tokens, output_tokens)
        name = limits.name
        if limits.concurrency is not None and self._in_flight.total(name) >= limits.concurrency:
            raise RequestError(
                429,
                f"{name!r} has {limits.concurrency} requests running already, its limit",
                code="rate_limit_exceeded",
                retry_after=1.0,
                headers=b"x-ratelimit-limit-concurrency: %d\r\n" % limits.concurrency,
            )
        headers = b""
        if limits.rates != (None, None, None):
            headers = self._charge(limits, now, amounts)
        self._in_flight.add(name, 1)
        return Lease(self, limits, amounts, headers)

    def _charge(self, limits: Limits, now: float, amounts: tuple[float, float, float]) -> bytes:
        cells = self._cells
        base = self._row_of(limits.name) * RATES
        paid: list[tuple[int, float, float]] = []
        wait, worst = 0.0, 0
        for index, per_minute in enumerate(limits.rates):
            if per_minute is None:
                continue
            paid_off = _paid_off(cells[base + index], now)
            paid.append((index, per_minute, paid_off))
            # A minute's allowance may be used at once; more than it waits for the whole of it.
            used = paid_off - now + min(amounts[index], per_minute) / per_minute * _MINUTE - _MINUTE
            if used > wait + _ROUNDING:
                wait, worst = used, index
        if wait:
            raise RequestError(
                429,
                f"{limits.name!r} has reached its limit of {limits.rates[worst]} {_WORDS[worst]}; "
                f"try again in {wait:.1f} s",
                code="rate_limit_exceeded",
                retry_after=wait,
                headers=_headers(paid, now),
            )
        for place, (index, per_minute, paid_off) in enumerate(paid):
            charged = cells[base + index] = _after(paid_off, per_minute, amounts[index], now)
            paid[place] = (index, per_minute, charged)
        return _headers(paid, now)

    def end(self, limits: Limits, now: float, input_tokens: float, output_tokens: float) -> None:
        """A request ended; charges what it used beyond its reservation, or gives the rest back."""
        self._in_flight.add(limits.name, -1)
        for index, amount in ((1, input_tokens), (2, output_tokens)):
            per_minute = limits.rates[index]
            if amount and per_minute is not None:
                cell = self._row_of(limits.name) * RATES + index
                self._cells[cell] = _after(_paid_off(self._cells[cell], now), per_minute, amount, now)


def _headers(paid: list[tuple[int, float, float]], now: float) -> bytes:
    """What is left, in OpenAI's header names; output tokens have names of their own."""
    lines = []
    for index, per_minute, paid_off in paid:
        owed = paid_off - now
        left = per_minute * (1 - (owed - _ROUNDING) / _MINUTE)
        lines.append(_LINES[index] % (per_minute, max(0, left), _duration(owed)))
    return b"".join(lines)


def _duration(seconds: float) -> bytes:
    """Seconds as clients of OpenAI's headers read them: ``120ms``, ``7.5s``, ``6m0s``."""
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    if seconds < _MINUTE:
        return b"%.4gs" % seconds
    return b"%dm%ds" % divmod(round(seconds), 60)
