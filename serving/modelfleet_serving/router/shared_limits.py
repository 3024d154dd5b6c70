"""Limits of tenants that several routers grant together, through the registry.

Every second a router tells what each tenant was charged since its last report, and what runs. The registry
adds that up over all routers and answers with what is owed altogether. Between two reports a router knows its
own charges at once and those of the others as they were: a tenant that uses all routers at the same time can
go over its limit by what it sends within about a second, and pays that off before it gets more.

Without a registry, and while it does not answer, each router grants by what it knows.
"""

from __future__ import annotations

from typing import Final

from modelfleet_serving.contract import TenantDebt, TenantUse
from modelfleet_serving.router.policy.quota import LONGEST, RATES, TenantRows, owed

_TRUSTED_SECONDS: Final = 5.0
"""For how long requests that other routers last spoke of are taken to be still running."""
_ROUNDING: Final = 1e-9

_Charged = tuple[float, float, float]
_NOTHING: Final[_Charged] = (0.0, 0.0, 0.0)


class SharedLimits:
    """One router's part in limits that are shared; see the module.

    Args:
        rows: what the workers of this router have charged.
    """

    def __init__(self, rows: TenantRows) -> None:
        self._rows = rows
        self._told: dict[int, _Charged] = {}
        """Charges by row, up to the last report that was answered."""
        self._asked: dict[int, _Charged] = {}
        """Charges by row, up to the report that is under way."""
        self._elsewhere: set[int] = set()
        """Rows whose tenants are busy at other routers."""
        self._heard = 0.0
        self._tags = b""
        self._tenants: list[tuple[int, int]] = []
        """Row and tag of each tenant that was ever seen; made anew when ``_tags`` has changed."""

    def report(self, now: float) -> list[TenantUse]:
        """What tenants did since the last report that was answered; monotonic seconds."""
        if self._elsewhere and now - self._heard > _TRUSTED_SECONDS:
            self._set_elsewhere({})
        self._asked = {}
        uses = []
        tags = self._rows.tags.tobytes()
        if tags != self._tags:
            self._tags = tags
            self._tenants = [(row, tag) for row, tag in enumerate(self._rows.tags.tolist()) if tag]
        for row, tag in self._tenants:
            charged = self._charged(row)
            told = self._told.get(row, _NOTHING)
            difference = (charged[0] - told[0], charged[1] - told[1], charged[2] - told[2])
            running = self._rows.here(row)
            if running or row in self._elsewhere or any(abs(part) > _ROUNDING for part in difference):
                self._asked[row] = charged
                owing = self._owed(row, now)
                uses.append(TenantUse(tenant=tag, charged=difference, owed=owing, running=running))
        return uses

    def adopt(self, debts: list[TenantDebt], now: float) -> None:
        """Takes over what the registry answered to the last report; monotonic seconds."""
        self._heard = now
        self._told.update(self._asked)
        running: dict[int, int] = {}
        for debt in debts:
            if not 0 < debt.tenant < 1 << 63:
                continue
            row = self._rows.row_of(debt.tenant)
            if self._rows.tags[row] != debt.tenant:
                continue  # no row is left: it is limited here as if it were alone
            if debt.running > 0:
                running[row] = debt.running
            charged = self._charged(row)
            told = self._told.get(row, _NOTHING)
            for rate in range(RATES):
                # What was charged since the report is not yet in the answer.
                seconds = debt.owed[rate] + charged[rate] - told[rate]
                self._rows.rates[row * RATES + rate] = now + max(0.0, min(seconds, LONGEST))
        self._set_elsewhere(running)

    def _set_elsewhere(self, running: dict[int, int]) -> None:
        for row in self._elsewhere - running.keys():
            self._rows.elsewhere[row] = 0
        for row, number in running.items():
            self._rows.elsewhere[row] = number
        self._elsewhere = set(running)

    def _charged(self, row: int) -> _Charged:
        of = self._rows.charged_in_all
        cell = row * RATES
        return of(cell), of(cell + 1), of(cell + 2)

    def _owed(self, row: int, now: float) -> _Charged:
        cell = row * RATES
        rates = self._rows.rates
        return owed(rates[cell], now), owed(rates[cell + 1], now), owed(rates[cell + 2], now)
