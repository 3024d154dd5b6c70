"""Heartbeats to the registry: at once on a change, otherwise as often as it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Final
from urllib.parse import quote

import aiohttp
import msgspec

from modelfleet_serving.contract import Heartbeat, HeartbeatReply
from modelfleet_serving.ray_token import TokenError, load_token

_log = logging.getLogger(__name__)

_TIMEOUT: Final = aiohttp.ClientTimeout(total=4, sock_connect=2)
_PRESENCE: Final = aiohttp.ClientTimeout(total=None, sock_connect=2)
_FIRST_INTERVAL: Final = 1.0
_BACKOFF_FIRST: Final = 0.1
_BACKOFF_MOST: Final = 2.0
"""A registry that starts anew waits for us a little longer than that before it publishes a table."""
_LAST_SECONDS: Final = 3.0
_LAST_AWAY_SECONDS: Final = 0.5


class HeartbeatSender:
    """Sends heartbeats while :meth:`run` runs. A registry that is away is tried again and again.

    It also holds a connection open, whose end shows the registry that this process was killed.

    Args:
        registry: base URL.
        replica: id of the replica.
        compose: makes the heartbeat with the given sequence number.
        on_reply: gets each reply with the sequence number of the heartbeat that it answers.
    """

    def __init__(
        self,
        registry: str,
        replica: str,
        compose: Callable[[int], Heartbeat],
        on_reply: Callable[[int, HeartbeatReply], None],
    ) -> None:
        self._url = registry.rstrip("/") + "/v1/heartbeat"
        self._presence_url = f"{registry.rstrip('/')}/v1/presence/{quote(replica, safe='')}"
        self._compose = compose
        self._on_reply = on_reply
        self._changed = asyncio.Event()
        self._sequence = 0
        self._interval = _FIRST_INTERVAL
        self._hurry: float | None = None
        self._token: str | None = None
        self._away = False

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats, as the registry wants it."""
        return self._interval

    @property
    def next_sequence(self) -> int:
        """Number of the next heartbeat to be composed: it tells of everything that is known now."""
        return self._sequence + 1

    def send_now(self) -> None:
        """Something has changed."""
        self._changed.set()

    def hurry(self, seconds: float | None) -> None:
        """Send at least so often, for as long as an answer is awaited."""
        self._hurry = seconds
        self._changed.set()

    async def run(self) -> None:
        """Send until cancelled."""
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, asyncio.TaskGroup() as group:
            group.create_task(self._send_always(session), name="heartbeat")
            group.create_task(self._be_present(session), name="presence")

    async def _send_always(self, session: aiohttp.ClientSession) -> None:
        backoff = _BACKOFF_FIRST
        while True:
            self._changed.clear()
            if await self._send(session):
                backoff = _BACKOFF_FIRST
                pause = min(self._interval, self._hurry or self._interval)
            else:
                pause = backoff
                backoff = min(backoff * 2, _BACKOFF_MOST)
            # Replicas that were started together must not report together for ever.
            pause *= random.uniform(0.85, 1.0)  # noqa: S311
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
                    if self._away:  # a change is no reason to knock more often
                        await asyncio.sleep(pause)
            except TimeoutError:
                continue

    async def _be_present(self, session: aiohttp.ClientSession) -> None:
        while True:
            # Of a registry that is away the heartbeats tell.
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, TokenError):
                headers = await self._authorization()
                async with session.get(self._presence_url, headers=headers, timeout=_PRESENCE) as answer:
                    if answer.status == 404:  # an older registry, which waits for our lease to end
                        return
                    if answer.status == 200:
                        try:
                            await answer.read()
                        finally:
                            self.send_now()  # we are alive
            await asyncio.sleep(_BACKOFF_MOST * random.uniform(0.5, 1.0))  # noqa: S311  spread, no secret

    async def send_last(self) -> None:
        """Say goodbye; given up soon when nobody answers, because the lease ends anyway."""
        limit = _LAST_AWAY_SECONDS if self._away else _LAST_SECONDS
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            try:
                async with asyncio.timeout(limit):
                    while not await self._send(session):  # noqa: ASYNC110  nothing to wait for but time
                        await asyncio.sleep(_BACKOFF_FIRST)
            except TimeoutError:
                _log.warning("the registry doesn't hear that this replica has ended; its lease will end")

    async def _send(self, session: aiohttp.ClientSession) -> bool:
        self._sequence += 1
        number = self._sequence
        heartbeat = self._compose(number)
        try:
            reply = await self._post(session, msgspec.json.encode(heartbeat))
        except (aiohttp.ClientError, TimeoutError, OSError, TokenError, msgspec.DecodeError) as error:
            if not self._away:
                _log.warning(
                    "registry %s: %s; the engine goes on", self._url, str(error) or type(error).__name__
                )
            self._away = True
            return False
        if self._away:
            _log.info("the registry answers again")
        self._away = False
        self._interval = min(max(reply.interval_seconds, 0.1), 60.0)
        self._on_reply(number, reply)
        return True

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> HeartbeatReply:
        headers = {"content-type": "application/json", **await self._authorization()}
        async with session.post(self._url, data=body, headers=headers) as answer:
            content = await answer.read()
        if answer.status == 401:
            self._token = None  # it may have been replaced: read it anew
        if answer.status != 200:
            raise aiohttp.ClientError(f"answered {answer.status}: {content[:200]!r}")
        return msgspec.json.decode(content, type=HeartbeatReply)

    async def _authorization(self) -> dict[str, str]:
        if self._token is None:
            self._token = await asyncio.to_thread(load_token)
        return {"authorization": f"Bearer {self._token}"} if self._token else {}
