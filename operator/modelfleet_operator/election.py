"""One process works, another stands by: leader election over a Lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.client.models import V1Lease, V1LeaseSpec, V1ObjectMeta
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.kube import LEASE, KubeClient
from modelfleet_operator.leadership import Leadership
from modelfleet_operator.metrics import ERRORS, LEADER
from modelfleet_operator.settings import Settings

log = logging.getLogger(__name__)

_CALL_SECONDS = 5.0
_END_SECONDS = 4.0
"""For the work to clean up, when it does not end by itself."""


class LeadershipLostError(Exception):
    """Another process works now."""


class _Lock(LeaseLock):  # type: ignore[misc]  # published without types
    """The Lease; an API server that does not answer takes nobody's leadership away.

    Nobody can take the Lease over while the API server is away, and when it is back the first look tells who
    has it. A leader that alone is cut off notices as soon as it is heard again; until then it must take what
    it did not write itself for another's work, and registries that have heard of a later term refuse what it
    says.
    """

    def __init__(self, name: str, namespace: str, identity: str, api: ApiClient) -> None:
        super().__init__(name, namespace, identity, api)
        self.holder = ""
        self.leadership = Leadership(term=0)

    async def get(self, name: str, namespace: str) -> Any:
        try:
            found = await asyncio.wait_for(super().get(name, namespace), _CALL_SECONDS)
        except (aiohttp.ClientError, TimeoutError) as error:
            return self._away(str(error) or "no answer")
        if isinstance(found[1], ApiException) and found[1].status != HTTPStatus.NOT_FOUND:
            # Also 403: an API server that starts knows no roles for a moment. Who can't read the Lease does
            # not know who leads.
            return self._away(str(found[1].reason))
        self.leadership.cut_off = False
        record = found[1]
        if isinstance(record, LeaderElectionRecord):
            self.holder = record.holder_identity or ""
        return found

    def _away(self, why: str) -> tuple[bool, ApiException]:
        ERRORS.labels(reason="LeaseUnreachable").inc()
        self.leadership.cut_off = True
        return False, ApiException(status=0, reason=why)

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        return await self._try(self._create(name, namespace, election_record))

    async def _create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        # As the library's own, which passes pretty=True: its generated client takes strings only (37.0).
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, lease)
        except ApiException as error:
            log.info("lease not created: %s %s", error.status, error.reason)
            return False
        self.leadership.term = lease.spec.lease_transitions
        return True

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        updated = await self._try(super().update(name, namespace, updated_record))
        if updated:
            self.leadership.term = self.lease_reference.spec.lease_transitions
        return updated

    def update_lease(
        self, leader_election_record: LeaderElectionRecord, current_spec: V1LeaseSpec | None = None
    ) -> V1LeaseSpec:
        # The library counts no transitions, and writes over the holder that tells whether this is one.
        renewed = current_spec is not None and current_spec.holder_identity == self.identity
        before = (current_spec.lease_transitions or 0) if current_spec is not None else 0
        spec = super().update_lease(leader_election_record, current_spec)
        spec.lease_transitions = self.leadership.next_term(before, renewed=renewed)
        return spec

    async def _try(self, call: Awaitable[bool]) -> bool:
        try:
            return await asyncio.wait_for(call, _CALL_SECONDS)
        except (aiohttp.ClientError, TimeoutError):
            return False


class _Election(LeaderElection):  # type: ignore[misc]
    """Renews for as long as nobody else holds the Lease."""

    def __init__(self, config: Config, lock: _Lock) -> None:
        super().__init__(config)
        self._lock = lock

    async def renew_loop(self) -> None:
        while True:
            await asyncio.sleep(self.election_config.retry_period)
            if await self.try_acquire_or_renew() or self._lock.leadership.cut_off:
                continue
            if self._lock.holder not in ("", self._lock.identity):
                return


async def lead(
    api: ApiClient,
    settings: Settings,
    work: Callable[[Leadership], Awaitable[None]],
    stop: asyncio.Event,
) -> None:
    """Wait for the Lease, work while it is ours, and give it back at the end.

    The work has ended before this returns: what it uses may be closed then.

    Args:
        api: the API server.
        settings: of the operator.
        work: the work; it is told what is known of this process's leadership, and ends at ``stop``.
        stop: set when this process is to end.

    Raises:
        LeadershipLostError: another process took over: this one must end.
    """
    lock = _Lock(settings.lease_name, settings.namespace, settings.identity, api)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    working: asyncio.Task[None] | None = None

    async def leading() -> None:
        nonlocal working
        working = asyncio.current_task()
        if stop.is_set():  # told to end while it was to begin
            done.set_result(None)
            return
        LEADER.set(1)
        log.info("%s leads", settings.identity)
        try:
            await work(lock.leadership)
        except asyncio.CancelledError:
            done.cancel()
            raise
        except BaseException as error:
            if not done.done():
                done.set_exception(error)
            raise
        done.set_result(None)

    async def stopped() -> None:
        if not done.done():
            done.set_exception(LeadershipLostError(f"{lock.holder} leads now"))

    retry = max(1.0, settings.lease_seconds / 7.5)
    seconds = round(settings.lease_seconds)  # a Lease has whole ones
    config = Config(lock, seconds, seconds * 2 / 3, retry, leading, stopped)
    election = asyncio.create_task(_Election(config, lock).run(), name="election")
    stopping = asyncio.create_task(stop.wait(), name="stopping")
    try:
        await asyncio.wait({election, done, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if election.done():
            election.result()
        if election.done() or working is not None:
            await done
    finally:
        for task in (election, stopping):
            task.cancel()
        await asyncio.gather(election, stopping, return_exceptions=True)
        # The library starts it, and forgets it when it is cancelled itself.
        await _end(working)
        if LEADER._value.get():
            LEADER.set(0)
            await _give_back(KubeClient(api, timeout=2.0), settings)


async def _end(task: asyncio.Task[None] | None) -> None:
    """Cancel a task unless that has been done, and wait until it has cleaned up."""
    if task is None:
        return
    if not task.done():
        if not task.cancelling():
            task.cancel()
        await asyncio.wait({task}, timeout=_END_SECONDS)
    if task.done() and not task.cancelled():
        task.exception()  # taken note of: the caller has it already


async def _give_back(kube: KubeClient, settings: Settings) -> None:
    """Free the Lease, so that the standby need not wait until it runs out."""
    try:
        lease = await kube.get(LEASE, settings.namespace, settings.lease_name)
        if lease["spec"].get("holderIdentity") == settings.identity:
            lease["spec"] |= {"holderIdentity": None, "acquireTime": None, "renewTime": None}
            await kube.call("PUT", LEASE.path(settings.namespace, settings.lease_name), body=lease)
    except ClientError as error:
        log.info("lease not given back: %s", error)
