"""Who may do what, as one worker applies it: keys from files that are reread, limits that workers share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.key_files import read_key_documents
from modelfleet_serving.router.policy.load import estimate_tokens
from modelfleet_serving.router.request import Request
from modelfleet_serving.router.tenants import (
    KeysError,
    KeyTable,
    Lease,
    Quotas,
    Tenant,
    parse_keys,
)

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_OPEN_PATHS: Final = frozenset({b"/healthz", b"/health", b"/readyz", b"/metrics"})


def load_keys(path: Path) -> tuple[dict[str, bytes], KeyTable]:
    """Documents and keys of a file or directory.

    Raises:
        KeysError: with every fault.
    """
    try:
        documents = read_key_documents(path)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or error}") from error
    return documents, parse_keys(documents)


class Tenancy:
    """API keys and limits. Without keys, everybody may do everything.

    Attributes:
        generation: changes with each reread of the keys.
    """

    def __init__(self, path: str, counters: Counters, loop: asyncio.AbstractEventLoop) -> None:
        """Reads the keys.

        Raises:
            KeysError: when there are none to start with.
        """
        self._path = Path(path) if path else None
        self._now: Callable[[], float] = loop.time
        self._keys: KeyTable | None = None
        self._documents: dict[str, bytes] = {}
        self.generation = 0
        if self._path is not None:
            self._documents, self._keys = load_keys(self._path)
        self._quotas = Quotas(counters.tenants)

    @property
    def enabled(self) -> bool:
        """Whether keys are checked here: then they are not the engines' to see."""
        return self._keys is not None

    def identify(self, request: Request) -> None:
        """Finds the tenant of a request, or notes why it is refused."""
        keys = self._keys
        if keys is None or request.path in _OPEN_PATHS or request.method == b"OPTIONS":
            return
        special = request.special
        try:
            request.tenant = keys.authenticate(special.get(b"authorization"), special.get(b"x-api-key"))
        except RequestError as error:
            request.refusal = error

    def admit(self, tenant: Tenant, size: int, output_tokens: int) -> Lease:
        """Reserves what a request will probably use.

        Raises:
            RequestError: 429.
        """
        return self._quotas.admit(
            tenant, self._now(), input_tokens=estimate_tokens(size), output_tokens=output_tokens
        )

    async def follow(self) -> None:
        """Rereads the keys whenever their files change; bad ones change nothing."""
        path = self._path
        while path is not None:
            await asyncio.sleep(POLL_SECONDS)
            try:
                documents = await asyncio.to_thread(read_key_documents, path)
                if documents == self._documents:
                    continue
                self._documents = documents
                self._keys = await asyncio.to_thread(parse_keys, documents)
                self.generation += 1
            except (KeysError, OSError) as error:
                _log.error("the API keys stay as they were: %s", error)
            else:
                _log.info("API keys reread: %d", len(self._keys))
