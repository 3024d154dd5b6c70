"""Tenants: API keys, what they may use, and how much.

Interface::

    table = parse_keys(read_key_documents(path))     # KeysError lists every fault; keep the old table then
    quotas = Quotas(shared_doubles, row_of, shared_in_flight)

    tenant = table.authenticate(headers.get(b"authorization"), headers.get(b"x-api-key"))   # RequestError 401
    tenant.check(model_or_adapter)                                                          # RequestError 403
    variants = tenant.variants_of(model)             # None: all; else the only ones to choose from
    tokens = estimate_tokens(readable_bytes(body))
    lease = quotas.admit(tenant, now, input_tokens=tokens, output_tokens=max_tokens)
    answer += lease.headers                          # x-ratelimit-*; RequestError 429 has them too
    lease.settle(now, prompt_tokens, completion_tokens)     # when it ends, with the engine's usage

**The file**, YAML or JSON; a directory (a mounted Secret) has such files, or one entry a file, whose name is
the tenant's unless the entry says otherwise::

    keys:
    - name: team-a
      hash: sha256:9f86d081...        # of the key; `hashes: [...]` while a key is being exchanged
      models: ["*"]                   # or names: "m", "m:variant", "adapter"; default: all
      requestsPerMinute: 600          # each limit is optional
      inputTokensPerMinute: 100000
      outputTokensPerMinute: 50000
      concurrency: 64
      priority: high                  # the highest class it may ask for; default: normal

Keys are made by :func:`generate_key` and have 256 random bits; a plain SHA-256 is right for those, and would
not be for passwords. No key is kept anywhere: a request's key is hashed, found by the beginning of its hash
and the whole hash compared in constant time. How long that takes says nothing about a key.

**Limits.** A minute's allowance may be used at once and comes back evenly. Tokens are reserved when a
request is admitted and corrected by the engine's usage when it ends. Limits hold for all workers of one
router that share memory; routers on several hosts each grant the whole limit: divide it by their number.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

import msgspec
import msgspec.structs
import yaml

from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.holding import NORMAL, PriorityError, parse_priority
from modelfleet_serving.router.policy.quota import RATES, InFlight, Lease, LocalInFlight, Quotas

__all__ = [
    "RATES",
    "InFlight",
    "KeyTable",
    "KeysError",
    "Lease",
    "LocalInFlight",
    "Quotas",
    "Tenant",
    "estimate_tokens",
    "generate_key",
    "hash_key",
    "parse_keys",
]

_SUFFIX: Final = re.compile(r"\.(ya?ml|json)$")
_FIELD: Final = re.compile(r"[A-Za-z]{1,32}")
_PREFIX: Final = "mf-"
_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")
_HIGHEST: Final = 5
_LOOKUP: Final = 16
"""Bytes of a hash that find it; all of it is compared then."""
_BYTES_PER_TOKEN: Final = 4
_CHALLENGE: Final = b"www-authenticate: Bearer\r\n"


class KeysError(ValueError):
    """Keys that can't be used; one line a fault, none with a key in it."""


def generate_key() -> str:
    """A new API key with 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What stands in the file for a key."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def estimate_tokens(size: int) -> int:
    """Tokens that a body of so many bytes probably has, for the reservation."""
    return size // _BYTES_PER_TOKEN


Positive = Annotated[int, msgspec.Meta(gt=0)]


class _Entry(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """One key of the file."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,100}$")] | None = None
    hash: str = ""
    hashes: list[str] = []
    models: tuple[str, ...] = ("*",)
    requests_per_minute: Positive | None = None
    input_tokens_per_minute: Positive | None = None
    output_tokens_per_minute: Positive | None = None
    concurrency: Positive | None = None
    priority: str | int = "normal"


_FIELDS: Final = frozenset(field.encode_name for field in msgspec.structs.fields(_Entry))


class Tenant:
    """Who a key belongs to and what it may do. Holds no key and no hash.

    Attributes:
        name: unique.
        rates: requests, input tokens and output tokens a minute, ``None`` for no limit.
        concurrency: requests at once.
        priority: the highest class it may ask for.
    """

    __slots__ = ("_all", "_variants", "concurrency", "name", "priority", "rates")

    def __init__(self, entry: _Entry, name: str, priority: int) -> None:
        self.name = name
        self.rates: tuple[float | None, float | None, float | None] = (
            entry.requests_per_minute,
            entry.input_tokens_per_minute,
            entry.output_tokens_per_minute,
        )
        self.concurrency = entry.concurrency
        self.priority = priority
        self._all = "*" in entry.models
        whole = {model for model in entry.models if ":" not in model}
        self._variants: dict[str, frozenset[str] | None] = dict.fromkeys(entry.models)
        for model, _, variant in (entry.rpartition(":") for entry in entry.models):
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
        found = self._tenants.get(digest[:_LOOKUP])
        if found is None or not hmac.compare_digest(digest, found[0]):
            raise RequestError(401, "incorrect API key provided", code="invalid_api_key", headers=_CHALLENGE)
        return found[1]


def parse_keys(documents: Mapping[str, bytes]) -> KeyTable:
    """The keys of all documents (by file name), each with ``keys: [...]`` or one entry.

    Raises:
        KeysError: with every fault.
    """
    faults: list[str] = []
    tenants: dict[bytes, tuple[bytes, Tenant]] = {}
    names: set[str] = set()
    for file, content in sorted(documents.items()):
        for place, raw in _entries(file, content, faults):
            entry = _convert(place, raw, faults)
            if entry is None:
                continue
            name = entry.name or ("" if isinstance(place, _Listed) else _SUFFIX.sub("", file))
            if not name:
                faults.append(f"{place}.name is missing")
            elif name in names:
                faults.append(f"{place}.name: {name!r} occurs twice")
            names.add(name)
            _add(place, entry, name, tenants, faults)
    if faults:
        raise KeysError("\n".join(faults))
    return KeyTable(tenants)


class _Listed(str):
    """Place of an entry in a list: it needs a name of its own."""

    __slots__ = ()


def _entries(file: str, content: bytes, faults: list[str]) -> Iterable[tuple[str, Any]]:
    try:
        document = yaml.safe_load(content)
    except yaml.YAMLError as error:
        # The error's text quotes the file, which may hold a key by mistake.
        mark = getattr(error, "problem_mark", None)
        faults.append(f"{file}: not valid YAML" + (f" in line {mark.line + 1}" if mark else ""))
        return []
    if isinstance(document, dict) and "keys" in document:
        listed = document["keys"]
        if len(document) > 1 or not isinstance(listed, list):
            faults.append(f"{file}: `keys` must be a list, and stand alone")
            return []
        return [(_Listed(f"{file}: keys[{index}]"), entry) for index, entry in enumerate(listed)]
    return [(f"{file}: entry", document)]


def _convert(place: str, raw: Any, faults: list[str]) -> _Entry | None:
    if isinstance(raw, dict) and "key" in raw:
        faults.append(f"{place}.key: a key itself must not stand in the file; give its hash")
        return None
    if isinstance(raw, dict) and (unknown := raw.keys() - _FIELDS):
        # Somebody may have written keys for fields: only what looks like a field's name is repeated.
        shown = sorted(f"{name}" if _FIELD.fullmatch(str(name)) else "one not shown" for name in unknown)
        faults.append(
            f"{place} has unknown fields ({', '.join(shown)}); known are {', '.join(sorted(_FIELDS))}"
        )
        return None
    try:
        return msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        faults.append(f"{place}: {error}")
        return None


def _add(
    place: str, entry: _Entry, name: str, tenants: dict[bytes, tuple[bytes, Tenant]], faults: list[str]
) -> None:
    try:
        priority = parse_priority(str(entry.priority), _HIGHEST)
    except PriorityError:
        faults.append(f"{place}.priority is not low, normal, high or -{_HIGHEST}..{_HIGHEST}")
        priority = NORMAL
    tenant = Tenant(entry, name, priority)
    hashes = [*([entry.hash] if entry.hash else []), *entry.hashes]
    if not hashes:
        faults.append(f"{place}.hash is missing")
    for text in hashes:
        matched = _HASH.fullmatch(text.strip().lower())
        if matched is None:
            faults.append(f"{place}.hash is not sha256: and 64 hexadecimal digits")
            continue
        digest = bytes.fromhex(matched[1])
        if digest[:_LOOKUP] in tenants:
            faults.append(f"{place}.hash occurs twice")
        tenants[digest[:_LOOKUP]] = (digest, tenant)
