"""Leading from its beginning to its end: the work is over before what it uses is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from modelfleet_operator import election
from modelfleet_operator.election import LeadershipLostError, lead
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.settings import Settings

Work = Callable[[Leadership], Awaitable[None]]


class Lease:
    """What the Lease says: whether it can be had, and what became of it."""

    def __init__(self) -> None:
        self.free = True
        self.given_back = 0


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> Lease:
    lease = Lease()

    async def try_acquire(self: object) -> bool:
        return lease.free

    async def renew(self: object) -> None:
        while lease.free:  # noqa: ASYNC110  the Lease is looked at now and then
            await asyncio.sleep(0.01)

    async def give_back(*_: object) -> None:
        lease.given_back += 1

    monkeypatch.setattr(election._Election, "try_acquire_or_renew", try_acquire)
    monkeypatch.setattr(election._Election, "renew_loop", renew)
    monkeypatch.setattr(election, "_give_back", give_back)
    return lease


@pytest.fixture
async def api() -> AsyncIterator[ApiClient]:
    async with ApiClient(Configuration()) as client:
        yield client


class Working:
    """Work that takes a while to end."""

    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop
        self.began = asyncio.Event()
        self.cleaned = False
        self.cancelled = False

    async def __call__(self, leadership: Leadership) -> None:
        self.began.set()
        try:
            await self.stop.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            await asyncio.sleep(0.05)
            self.cleaned = True


async def test_the_work_has_ended_when_it_is_told_to_stop(lease: Lease, api: ApiClient) -> None:
    stop = asyncio.Event()
    work = Working(stop)
    leading = asyncio.create_task(lead(api, Settings(), work, stop))
    await work.began.wait()
    stop.set()
    await asyncio.wait_for(leading, 5)
    assert work.cleaned
    assert not work.cancelled
    assert lease.given_back == 1


async def test_the_work_has_ended_when_leadership_is_lost(lease: Lease, api: ApiClient) -> None:
    stop = asyncio.Event()
    work = Working(stop)
    leading = asyncio.create_task(lead(api, Settings(), work, stop))
    await work.began.wait()
    lease.free = False
    with pytest.raises(LeadershipLostError):
        await asyncio.wait_for(leading, 5)
    assert work.cleaned
    assert work.cancelled


async def test_the_work_has_ended_when_leading_is_cancelled(lease: Lease, api: ApiClient) -> None:
    stop = asyncio.Event()
    work = Working(stop)
    leading = asyncio.create_task(lead(api, Settings(), work, stop))
    await work.began.wait()
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading
    assert work.cleaned
    assert lease.given_back == 1


async def test_a_standby_ends_at_once_and_gives_nothing_back(lease: Lease, api: ApiClient) -> None:
    lease.free = False
    stop = asyncio.Event()
    leading = asyncio.create_task(lead(api, Settings(), Working(stop), stop))
    await asyncio.sleep(0.02)
    stop.set()
    await asyncio.wait_for(leading, 1)
    assert not lease.given_back


async def test_told_to_stop_while_it_is_to_begin(lease: Lease, api: ApiClient) -> None:
    stop = asyncio.Event()
    stop.set()
    work = Working(stop)
    await asyncio.wait_for(lead(api, Settings(), work, stop), 1)
    assert not work.began.is_set()


async def test_work_that_fails_is_the_error_of_leading(lease: Lease, api: ApiClient) -> None:
    async def fail(leadership: Leadership) -> None:
        raise ValueError("no way")

    with pytest.raises(ValueError, match="no way"):
        await asyncio.wait_for(lead(api, Settings(), fail, asyncio.Event()), 5)
    assert lease.given_back == 1
