"""JSON over HTTP with time-outs, a bearer token and typed errors: what the control-plane clients share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from modelfleet_operator.clients.errors import RefusedError, UnavailableError

DEFAULT_TIMEOUT: Final = 30.0
_ERROR_HEAD: Final = 200
_ERROR_TAIL: Final = 600
"""Characters of an error's beginning and end: the one tells a page from a traceback, the other says why."""


@dataclass
class JsonClient:
    """Calls one server.

    Attributes:
        session: shared connection pool; its owner closes it.
        address: base URL.
        token: gives the bearer token at each call, so that a rotated one is used at once.
        timeout: seconds for one call.
    """

    session: aiohttp.ClientSession = field(repr=False)
    address: str
    token: Callable[[], str | None] = field(repr=False)
    timeout: float = DEFAULT_TIMEOUT

    def __post_init__(self) -> None:
        self.address = self.address.rstrip("/")

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, str] | None = None,
        extra: Mapping[str, str] | None = None,
        limit_seconds: float | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of the answer; 304 and 404 are answers, too.

        Args:
            method: HTTP method.
            path: below the address.
            body: JSON.
            query: parameters.
            extra: further headers.
            limit_seconds: in place of the client's time-out.

        Raises:
            UnavailableError: no connection, time-out, or a 5xx answer.
            RefusedError: any other 4xx answer.
        """
        headers = {"content-type": "application/json", **(extra or {})}
        if token := self.token():
            headers["authorization"] = f"Bearer {token}"
        limit = aiohttp.ClientTimeout(total=limit_seconds or self.timeout, sock_connect=5)
        url = self.address + path
        try:
            async with self.session.request(
                method, url, data=body, params=query, headers=headers, timeout=limit
            ) as answer:
                content = await answer.read()
        except TimeoutError as error:
            raise UnavailableError(f"{method} {url}: no answer within {limit.total} s") from error
        except aiohttp.ClientError as error:
            raise UnavailableError(f"{method} {url}: {error}") from error
        if answer.status >= 500 or answer.status == 429:
            raise UnavailableError(f"{method} {url}: {answer.status} {_text(content)}")
        if answer.status >= 400 and answer.status != 404:
            raise RefusedError(f"{method} {url}: {answer.status} {_text(content)}", answer.status)
        return answer.status, content

    def decode(self, content: bytes, kind: Any) -> Any:
        """The body as a type.

        Raises:
            UnavailableError: the body is not what was agreed on, as from a proxy's error page.
        """
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            seen = _text(content[:80])
            raise UnavailableError(f"{self.address}: answer not understood: {error}: {seen!r}") from error


def _text(content: bytes) -> str:
    text = " ".join(content.decode(errors="replace").split())
    if len(text) <= _ERROR_HEAD + _ERROR_TAIL:
        return text
    return f"{text[:_ERROR_HEAD]} ... {text[-_ERROR_TAIL:]}"
