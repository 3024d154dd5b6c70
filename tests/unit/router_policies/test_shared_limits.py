"""Limits that several routers grant together, through the registry's accounts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfleet_serving.contract import DemandReply, DemandReport, TenantUse
from modelfleet_serving.registry.tenants import MAX_TENANTS, TenantAccounts
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.policy.quota import Lease, Limits, Quotas, TenantRows
from modelfleet_serving.router.shared_limits import SharedLimits

TEAM = Limits("team", (600.0, None, None), 8)


@dataclass
class Router:
    """One router: what it grants, and its part in sharing."""

    name: str
    rows: TenantRows = field(default_factory=TenantRows.private)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.rows)
        self.shared = SharedLimits(self.rows)

    def admit(self, limits: Limits, now: float, **tokens: float) -> Lease | None:
        try:
            return self.quotas.admit(limits, now, **tokens)
        except RequestError:
            return None

    def exchange(self, accounts: TenantAccounts, now: float) -> None:
        """One report and its answer, as they cross the network."""
        report = DemandReport(router=self.name, tenants=self.shared.report(now))
        arrived = msgspec.json.decode(msgspec.json.encode(report), type=DemandReport)
        reply = DemandReply(tenants=accounts.report(arrived.router, arrived.tenants, now))
        self.shared.adopt(msgspec.json.decode(msgspec.json.encode(reply), type=DemandReply).tenants, now)

    def remaining(self, limits: Limits, now: float) -> float:
        row = self.rows.row(limits.name)
        return 60.0 - max(0.0, self.rows.rates[row * 3] - now)


def test_what_one_router_granted_another_does_not_grant_again() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    limits = Limits("t", (10.0, None, None), None)
    leases = [one.admit(limits, 100.0) for _ in range(10)]
    assert all(leases)
    one.exchange(accounts, 100.5)
    other.exchange(accounts, 100.6)
    assert other.admit(limits, 100.7) is None
    assert other.admit(limits, 106.7) is not None  # one a six seconds comes back
    one.exchange(accounts, 107.0)
    other.exchange(accounts, 107.1)
    one.exchange(accounts, 107.2)
    assert one.admit(limits, 107.3) is None


def test_requests_at_once_count_everywhere_and_end_everywhere() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    leases = [one.admit(TEAM, 1.0) for _ in range(8)]
    one.exchange(accounts, 1.1)
    other.exchange(accounts, 1.2)
    assert other.admit(TEAM, 1.3) is None
    for lease in leases:
        assert lease is not None
        lease.settle(2.0)
    one.exchange(accounts, 2.1)
    other.exchange(accounts, 2.2)
    assert other.admit(TEAM, 2.3) is not None


def test_reservations_that_are_given_back_are_given_back_everywhere() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    limits = Limits("t", (None, None, 1000.0), None)
    lease = one.admit(limits, 1.0, output_tokens=1000)
    assert lease is not None
    one.exchange(accounts, 1.1)
    other.exchange(accounts, 1.2)
    assert other.admit(limits, 1.3, output_tokens=100) is None
    lease.settle(2.0, 10, 50)
    one.exchange(accounts, 2.1)
    other.exchange(accounts, 2.2)
    assert other.admit(limits, 2.3, output_tokens=900) is not None


def test_what_is_charged_while_a_report_is_under_way_is_not_lost() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    limits = Limits("t", (10.0, None, None), None)
    other.admit(limits, 1.0)
    other.exchange(accounts, 1.0)
    report = one.shared.report(1.0)  # nothing yet
    for _ in range(5):
        assert one.admit(limits, 1.05)
    one.shared.adopt(accounts.report("one", report, 1.1), 1.1)
    assert one.remaining(limits, 1.1) == pytest.approx(24.1, abs=0.2)  # six of ten are used
    one.exchange(accounts, 2.0)
    other.exchange(accounts, 2.0)
    assert other.remaining(limits, 2.0) == pytest.approx(25.0, abs=0.2)


def test_a_report_that_was_not_answered_is_told_again() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    limits = Limits("t", (10.0, None, None), None)
    assert one.admit(limits, 1.0)
    one.shared.report(1.0)  # lost on its way
    assert one.admit(limits, 1.5)
    one.exchange(accounts, 2.0)
    other.exchange(accounts, 2.0)
    assert other.remaining(limits, 2.0) == pytest.approx(49.0, abs=0.1)


def test_a_registry_that_starts_anew_learns_from_the_routers() -> None:
    one, other = Router("one"), Router("other")
    accounts = TenantAccounts()
    limits = Limits("t", (10.0, None, None), None)
    for _ in range(9):
        assert one.admit(limits, 1.0)
    for router in (one, other):
        router.exchange(accounts, 1.1)
    accounts = TenantAccounts()
    assert other.admit(limits, 2.0)
    for router in (other, one, other):
        router.exchange(accounts, 2.1)
    assert one.admit(limits, 2.2) is None
    assert other.admit(limits, 2.2) is None


def test_without_a_registry_what_runs_elsewhere_is_soon_forgotten() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    for _ in range(8):
        one.admit(TEAM, 1.0)
    one.exchange(accounts, 1.1)
    other.exchange(accounts, 1.2)
    other.shared.report(5.0)
    assert other.admit(TEAM, 5.0) is None
    other.shared.report(7.0)
    assert other.admit(TEAM, 7.0) is not None


def test_a_router_that_is_gone_runs_nothing() -> None:
    accounts = TenantAccounts()
    one, other = Router("one"), Router("other")
    for _ in range(8):
        one.admit(TEAM, 1.0)
    one.exchange(accounts, 1.1)
    accounts.forget("one")
    other.exchange(accounts, 1.2)
    assert other.admit(TEAM, 1.3) is not None


@pytest.mark.parametrize("odd", [1e300, -1e300, 5e-324])
def test_odd_numbers_lock_nobody_out_for_long(odd: float) -> None:
    accounts = TenantAccounts()
    for _ in range(3):
        debts = accounts.report("r", [TenantUse(tenant=7, charged=(odd,) * 3, owed=(odd,) * 3)], 1.0)
    assert all(0.0 <= seconds <= 600.0 for debt in debts for seconds in debt.owed)


def test_accounts_are_bounded_and_go_when_all_is_paid() -> None:
    accounts = TenantAccounts()
    uses = [TenantUse(tenant=number + 1, owed=(1.0, 0.0, 0.0)) for number in range(MAX_TENANTS + 10)]
    accounts.report("r", uses, 1.0)
    assert len(accounts) == MAX_TENANTS
    accounts.report("r", [], 3.0)
    assert len(accounts) == 0


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    routers=st.integers(1, 5),
    lost=st.sampled_from([0.0, 0.0, 0.3]),
    rate=st.sampled_from([60.0, 600.0]),
)
def test_over_minutes_all_routers_together_grant_the_limit(
    seed: int, routers: int, lost: float, rate: float
) -> None:
    """Who asks all the time, everywhere, gets a minute's worth, then the rate, and a second's excess."""
    rng = random.Random(seed)
    fleet = [Router(f"r{number}") for number in range(routers)]
    accounts = TenantAccounts()
    limits = Limits("t", (rate, None, None), None)
    tick = 0.1
    asked_per_tick = 10 * rate / 60 * tick  # ten times what it may
    granted = 0
    due = {router.name: rng.random() for router in fleet}
    minutes = 3
    for step in range(int(minutes * 60 / tick)):
        now = 1000.0 + step * tick
        for _ in range(max(1, round(asked_per_tick))):
            lease = rng.choice(fleet).admit(limits, now)
            if lease is not None:
                granted += 1
                lease.settle(now)
        for router in fleet:
            due[router.name] -= tick
            if due[router.name] <= 0:
                due[router.name] += 1.0
                if rng.random() >= lost:
                    router.exchange(accounts, now)
    fair = rate * (minutes + 1)
    excess = rate / 60 * 10 * (3.0 if lost else 1.5) * (routers > 1)
    assert granted <= fair + excess + routers
    assert granted >= 0.97 * rate * minutes
