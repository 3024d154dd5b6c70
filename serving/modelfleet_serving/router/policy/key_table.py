"""Who a key belongs to, and what it may do: the part that every request asks."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Final

from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.policy.quota import Limits

LOOKUP: Final = 16
"""Bytes of a hash that find it; all of it is compared then."""
_CHALLENGE: Final = b"www-authenticate: Bearer\r\n"


class Tenant(Limits):
    """Who a key belongs to and what it may do. Holds no key and no hash.

    Args:
        name: Unique.
        models: What it may use: ``*``, models, ``model:variant``, adapters.
        rates: Requests, input tokens and output tokens a minute; ``None`` is no limit.
        concurrency: Requests at once.
        priority: The highest class it may ask for.
    """

    __slots__ = ("_all", "_variants", "priority")

    def __init__(
        self,
        name: str,
        models: Sequence[str],
        rates: tuple[float | None, float | None, float | None],
        concurrency: int | None,
        priority: int,
    ) -> None:
        super().__init__(name, rates, concurrency)
        self.priority = priority
        self._all = "*" in models
        whole = {model for model in models if ":" not in model}
        self._variants: dict[str, frozenset[str] | None] = dict.fromkeys(models)
        for model, _, variant in (entry.rpartition(":") for entry in models):
            if model and model not in whole:
                self._variants[model] = (self._variants.get(model) or frozenset()) | {variant}

    def __repr__(self) -> str:
        return f"Tenant({self.name!r})"

    def allows(self, model: str) -> bool:
        """Whether it may use a model or adapter, or at least one variant of it."""
        return self._all or model in self._variants

    def variants_of(self, model: str) -> frozenset[str] | None:
        """The variants of a model that it may use; ``None`` for all of them."""
        return None if self._all else self._variants.get(model)

    def check(self, model: str, variant: str | None = None) -> None:
        """Refuses what it may not use.

        Args:
            model: The model or adapter that a request names.
            variant: The variant that it is pinned to.

        Raises:
            RequestError: 403.
        """
        if self._all:
            return
        variants = self._variants.get(model, frozenset())
        if variants is None or variant in variants or (variant is None and variants):
            return
        asked = model if variant is None else f"{model}:{variant}"
        raise RequestError(
            403, f"this API key may not use {asked[:200]!r}", code="model_not_allowed", param="model"
        )


class KeyTable:
    """All keys, immutable: a reread makes a new one."""

    __slots__ = ("_tenants", "names")

    def __init__(self, tenants: Mapping[bytes, tuple[bytes, Tenant]]) -> None:
        self._tenants = dict(tenants)
        self.names = frozenset(tenant.name for _, tenant in tenants.values())

    def __repr__(self) -> str:
        return f"KeyTable({len(self.names)} tenants)"

    def __len__(self) -> int:
        return len(self._tenants)

    def authenticate(self, authorization: bytes | None, api_key: bytes | None = None) -> Tenant:
        """The tenant of a request, by its ``authorization`` header or else ``x-api-key``.

        Raises:
            RequestError: 401.
        """
        if authorization is not None:
            scheme, _, key = authorization.strip().partition(b" ")
            if scheme.lower() != b"bearer":
                raise RequestError(
                    401, "the authorization scheme must be Bearer", code="invalid_api_key", headers=_CHALLENGE
                )
        else:
            key = api_key or b""
        key = key.strip()
        if not key:
            raise RequestError(
                401,
                "you didn't provide an API key: send it as 'Authorization: Bearer KEY'",
                code="missing_api_key",
                headers=_CHALLENGE,
            )
        digest = hashlib.sha256(key).digest()
        found = self._tenants.get(digest[:LOOKUP])
        if found is None or not hmac.compare_digest(digest, found[0]):
            raise RequestError(401, "incorrect API key provided", code="invalid_api_key", headers=_CHALLENGE)
        return found[1]
