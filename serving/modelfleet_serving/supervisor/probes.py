"""Asking a running engine how it is."""

from __future__ import annotations

from typing import Final

import aiohttp

from modelfleet_serving.contract import EngineLoad
from modelfleet_serving.engines import Call, EngineAdapter, Probe

_METRICS_SECONDS: Final = 5.0
_METRICS_BYTES: Final = 8 * 2**20
_ANSWER_BYTES: Final = 1000
"""As much of an answer as is worth telling."""


class EngineClient:
    """Calls one engine's own HTTP server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, adapter: EngineAdapter) -> None:
        self._session = session
        self._url = url
        self._adapter = adapter

    async def check(self, probe: Probe) -> str:
        """Why a probe failed; empty when it succeeded."""
        limit = aiohttp.ClientTimeout(total=probe.timeout_seconds)
        try:
            async with self._session.get(self._url + probe.path, timeout=limit) as answer:
                return "" if answer.status == probe.status else f"GET {probe.path} answered {answer.status}"
        except TimeoutError:
            return f"GET {probe.path} not answered within {probe.timeout_seconds:g} s"
        except aiohttp.ClientError as error:
            return f"GET {probe.path}: {error}"

    async def call(self, call: Call, timeout_seconds: float) -> str:
        """Why a call failed; empty when it succeeded."""
        what = f"{call.method} {call.path}"
        limit = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            async with self._session.request(
                call.method, self._url + call.path, json=call.body, timeout=limit
            ) as answer:
                text = (await answer.content.read(_ANSWER_BYTES)).decode(errors="replace")
                return "" if answer.status in call.success else f"{what} answered {answer.status}: {text}"
        except TimeoutError:
            return f"{what} not answered within {timeout_seconds:g} s"
        except aiohttp.ClientError as error:
            return f"{what}: {error}"

    async def load(self) -> EngineLoad | None:
        """What the engine works on, or ``None`` when it doesn't say."""
        limit = aiohttp.ClientTimeout(total=_METRICS_SECONDS)
        try:
            async with self._session.get(self._url + self._adapter.metrics_path, timeout=limit) as answer:
                if answer.status != 200:
                    return None
                text = (await answer.content.read(_METRICS_BYTES)).decode(errors="replace")
                while chunk := await answer.content.read(_METRICS_BYTES):
                    text += chunk.decode(errors="replace")
                    if len(text) > _METRICS_BYTES:
                        return None
            return self._adapter.read_load(text)
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return None
