"""What tenants have used at all routers together: the registry's part in limits that routers share. Pure.

The account of a rate is one number, the time at which all that was used is paid off: the routers' own way of
counting (:mod:`modelfleet_serving.router.policy.quota`), of which this is the sum.
"""

from __future__ import annotations

from typing import Final

from modelfleet_serving.contract import TenantDebt, TenantUse

LONGEST: Final = 600.0
"""Most seconds that anybody can owe."""
MAX_TENANTS: Final = 16_384
"""Accounts that are kept at most; as many as a router keeps."""


class TenantAccounts:
    """Accounts by hash of the tenant's name."""

    def __init__(self) -> None:
        self._paid: dict[int, list[float]] = {}
        """By tenant, when each of its rates is paid off."""
        self._running: dict[str, dict[int, int]] = {}
        """By router, requests in flight by tenant."""

    def __len__(self) -> int:
        return len(self._paid)

    def report(self, router: str, uses: list[TenantUse], now: float) -> list[TenantDebt]:
        """Takes in what tenants did at a router; what all of them owe, as far as that router has to know."""
        self._running[router] = {use.tenant: use.running for use in uses if use.running > 0}
        for use in uses:
            self._charge(use, now)
        busy: dict[int, int] = {}
        for other, tenants in self._running.items():
            if other != router:
                for tenant, running in tenants.items():
                    busy[tenant] = busy.get(tenant, 0) + running
        asked = {use.tenant for use in uses}
        debts = []
        for tenant in list(self._paid):
            owed = self._owed(tenant, now)
            if tenant in asked or tenant in busy or any(owed):
                debts.append(TenantDebt(tenant=tenant, owed=owed, running=busy.get(tenant, 0)))
            elif not any(tenant in tenants for tenants in self._running.values()):
                del self._paid[tenant]
        return debts

    def forget(self, router: str) -> None:
        """It is gone, and with it what ran there; what was used stays used."""
        self._running.pop(router, None)

    def _charge(self, use: TenantUse, now: float) -> None:
        paid = self._paid.get(use.tenant)
        if paid is not None:
            for rate, seconds in enumerate(use.charged):
                paid[rate] = now + _bounded(max(0.0, paid[rate] - now) + seconds)
        elif len(self._paid) < MAX_TENANTS:
            # The router's own view has what it was told by a registry before this one.
            self._paid[use.tenant] = [now + _bounded(seconds) for seconds in use.owed]

    def _owed(self, tenant: int, now: float) -> tuple[float, float, float]:
        requests, read, written = (max(0.0, paid - now) for paid in self._paid[tenant])
        return requests, read, written


def _bounded(seconds: float) -> float:
    return max(0.0, min(seconds, LONGEST))
