"""Tenants: API keys, what they may use, and how much.

Interface::

    table = parse_keys(read_key_documents(path))     # KeysError lists every fault; keep the old table then
    quotas = Quotas(counters.tenants)

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
router at once, and for all routers of one registry within about a second
(:mod:`modelfleet_serving.router.shared_limits`). Routers with a table from a file each grant the whole limit.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

import msgspec
import msgspec.structs
import yaml

from modelfleet_serving.router.holding import NORMAL, PriorityError, parse_priority
from modelfleet_serving.router.policy.key_table import LOOKUP, KeyTable, Tenant
from modelfleet_serving.router.policy.load import estimate_tokens
from modelfleet_serving.router.policy.quota import HIGHEST, RATES, Lease, Quotas, TenantRows

__all__ = [
    "RATES",
    "KeyTable",
    "KeysError",
    "Lease",
    "Quotas",
    "Tenant",
    "TenantRows",
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


class KeysError(ValueError):
    """Keys that can't be used; one line a fault, none with a key in it."""


def generate_key() -> str:
    """A new API key with 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What stands in the file for a key."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


Positive = Annotated[int, msgspec.Meta(gt=0, le=HIGHEST)]


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
    rates = (entry.requests_per_minute, entry.input_tokens_per_minute, entry.output_tokens_per_minute)
    tenant = Tenant(name, entry.models, rates, entry.concurrency, priority)
    hashes = [*([entry.hash] if entry.hash else []), *entry.hashes]
    if not hashes:
        faults.append(f"{place}.hash is missing")
    for text in hashes:
        matched = _HASH.fullmatch(text.strip().lower())
        if matched is None:
            faults.append(f"{place}.hash is not sha256: and 64 hexadecimal digits")
            continue
        digest = bytes.fromhex(matched[1])
        if digest[:LOOKUP] in tenants:
            faults.append(f"{place}.hash occurs twice")
        tenants[digest[:LOOKUP]] = (digest, tenant)
