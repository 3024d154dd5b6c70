from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.key_files import read_key_documents
from modelfleet_serving.router.tenants import (
    RATES,
    KeysError,
    KeyTable,
    Lease,
    Quotas,
    Tenant,
    TenantRows,
    estimate_tokens,
    generate_key,
    hash_key,
    parse_keys,
)

KEY = "mf-" + "k" * 43


def table(*entries: dict[str, object]) -> KeyTable:
    return parse_keys({"keys.yaml": json.dumps({"keys": list(entries)}).encode()})


def tenant(**fields: object) -> Tenant:
    return table({"name": "team", "hash": hash_key(KEY), **fields}).authenticate(b"Bearer " + KEY.encode())


def faults(content: bytes | dict[str, object]) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(KeysError) as error:
        parse_keys({"keys.yaml": data})
    return str(error.value)


# --- Keys ---


def test_a_generated_key_finds_its_tenant_in_either_header() -> None:
    keys = {name: generate_key() for name in ("a", "b")}
    found = table(*({"name": name, "hash": hash_key(key)} for name, key in keys.items()))
    for name, key in keys.items():
        assert key.startswith("mf-")
        assert len(key) > 40
        assert found.authenticate(f"Bearer {key}".encode()).name == name
        assert found.authenticate(f"bearer  {key} ".encode()).name == name
        assert found.authenticate(None, key.encode()).name == name


@pytest.mark.parametrize(
    ("authorization", "api_key", "code"),
    [
        (None, None, "missing_api_key"),
        (b"Bearer ", None, "missing_api_key"),
        (b"Bearer mf-wrong", None, "invalid_api_key"),
        (b"Basic " + KEY.encode(), None, "invalid_api_key"),
        (None, KEY[:-1].encode(), "invalid_api_key"),
        (b"Bearer wrong", KEY.encode(), "invalid_api_key"),
        (b"Bearer " + hash_key(KEY).encode(), None, "invalid_api_key"),
        (b"Bearer \xff\xfe", None, "invalid_api_key"),
    ],
)
def test_other_credentials_are_refused_without_saying_more(
    authorization: bytes | None, api_key: bytes | None, code: str
) -> None:
    with pytest.raises(RequestError) as error:
        table({"name": "team", "hash": hash_key(KEY)}).authenticate(authorization, api_key)
    assert (error.value.status, error.value.code) == (401, code)
    assert KEY not in error.value.message
    assert b"www-authenticate: Bearer" in error.value.extra_headers()


def test_two_keys_are_good_while_one_is_exchanged_for_the_other() -> None:
    found = table({"name": "team", "hashes": [hash_key("old"), hash_key("new")]})
    assert found.authenticate(b"Bearer old") is found.authenticate(b"Bearer new")


def test_neither_keys_nor_hashes_show() -> None:
    found = table({"name": "team", "hash": hash_key(KEY)})
    shown = repr(found) + repr(found.authenticate(None, KEY.encode()))
    assert KEY not in shown
    assert hash_key(KEY)[7:] not in shown


@pytest.mark.parametrize(
    ("allowed", "model", "variant", "verdict"),
    [
        (["*"], "m", "awq", True),
        (["m"], "m", None, True),
        (["m"], "m", "awq", True),
        (["m"], "other", None, False),
        (["m:awq"], "m", None, True),
        (["m:awq"], "m", "awq", True),
        (["m:awq"], "m", "bf16", False),
        (["m:awq", "m"], "m", "bf16", True),
        (["a:b"], "a:b", None, True),
        (["lora"], "m", None, False),
        ([], "m", None, False),
    ],
)
def test_models_and_variants_that_a_key_may_use(
    allowed: list[str], model: str, variant: str | None, verdict: bool
) -> None:
    one = tenant(models=allowed)
    if verdict:
        one.check(model, variant)
        assert one.allows(model)
    else:
        with pytest.raises(RequestError) as error:
            one.check(model, variant)
        assert error.value.status == 403


def test_variants_narrow_the_choice() -> None:
    assert tenant(models=["m:awq", "m:fp8"]).variants_of("m") == {"awq", "fp8"}
    assert tenant(models=["m"]).variants_of("m") is None
    assert tenant().variants_of("m") is None


def test_a_directory_has_an_entry_or_a_list_a_file(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / ".hidden").write_text("not: [yaml")
    (tmp_path / "team.a").write_text(f"hash: {hash_key('a')}\npriority: high\n")
    (tmp_path / "team-b.yaml").write_text(f"hash: {hash_key('b')}\n")
    (tmp_path / "more.yaml").write_text(json.dumps({"keys": [{"name": "c", "hash": hash_key("c")}]}))
    found = parse_keys(read_key_documents(tmp_path))
    assert found.names == {"team.a", "team-b", "c"}
    assert found.authenticate(b"Bearer a").priority == 1
    assert read_key_documents(tmp_path / "team.a").keys() == {"team.a"}


def test_every_fault_is_told_with_its_place() -> None:
    text = faults(
        {
            "keys": [
                {"hash": hash_key("1")},
                {"name": "a"},
                {"name": "b", "hash": "9f86d0"},
                {"name": "c", "hash": hash_key("1"), "priority": "urgent"},
                {"name": "c", "hash": hash_key("2"), "requestPerMinute": 5},
                {"name": "d", "hash": hash_key("3"), "requestsPerMinute": 0},
                {"name": "c", "hash": hash_key("4")},
                {"name": "e", "hash": hash_key("5"), "outputTokensPerMinute": 10**400},
            ]
        }
    )
    for part in (
        "keys[0].name is missing",
        "keys[1].hash is missing",
        "keys[2].hash is not sha256:",
        "keys[3].priority",
        "keys[3].hash occurs twice",
        "keys[4] has unknown fields (requestPerMinute)",
        "keys[5]: Expected `int` >= 1",
        "keys[6].name: 'c' occurs twice",
        "keys[7]: ",
    ):
        assert part in text


@pytest.mark.parametrize(
    "content",
    [
        {"keys": [{"name": "a", "key": KEY}]},
        {"keys": [{"name": "a", "hash": KEY}]},
        {"keys": [{KEY: "a"}]},
        {"keys": [KEY]},
        f"keys: [{{name: a, hash: {KEY}\n".encode(),
        KEY.encode(),
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(content: bytes | dict[str, object]) -> None:
    assert KEY not in faults(content)


# --- Quotas ---


def admit(quotas: Quotas, one: Tenant, now: float, **tokens: float) -> Lease | RequestError:
    try:
        return quotas.admit(one, now, **tokens)
    except RequestError as error:
        return error


def test_requests_of_a_minute_may_come_at_once_and_come_back_evenly() -> None:
    quotas, one = Quotas(), tenant(requestsPerMinute=60)
    assert all(isinstance(admit(quotas, one, 100.0), Lease) for _ in range(60))
    refused = admit(quotas, one, 100.0)
    assert isinstance(refused, RequestError)
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.retry_after == pytest.approx(1.0)
    assert isinstance(admit(quotas, one, 100.9), RequestError)
    assert isinstance(admit(quotas, one, 101.0), Lease)
    assert isinstance(admit(quotas, one, 101.0), RequestError)


def test_headers_say_what_is_left() -> None:
    quotas, one = Quotas(), tenant(requestsPerMinute=600, inputTokensPerMinute=1000)
    lease = quotas.admit(one, 0.0, input_tokens=100)
    assert lease.headers == (
        b"x-ratelimit-limit-requests: 600\r\n"
        b"x-ratelimit-remaining-requests: 599\r\n"
        b"x-ratelimit-reset-requests: 100ms\r\n"
        b"x-ratelimit-limit-tokens: 1000\r\n"
        b"x-ratelimit-remaining-tokens: 900\r\n"
        b"x-ratelimit-reset-tokens: 6s\r\n"
    )
    lease.settle(0.0, 1200, 5)
    refused = admit(quotas, one, 0.0, input_tokens=1)
    assert isinstance(refused, RequestError)
    lines = refused.extra_headers()
    assert b"x-ratelimit-remaining-tokens: 0\r\n" in lines
    assert b"x-ratelimit-reset-tokens: 1m12s\r\n" in lines
    assert b"retry-after: 13\r\n" in lines  # 12.06 s: until one token is left


def test_reserved_tokens_give_way_to_the_used_ones() -> None:
    quotas, one = Quotas(), tenant(inputTokensPerMinute=1000, outputTokensPerMinute=1000)
    lease = quotas.admit(one, 0.0, input_tokens=200, output_tokens=1000)
    assert isinstance(admit(quotas, one, 0.0, output_tokens=10), RequestError)
    lease.settle(0.0, 100, 50)
    lease.settle(0.0, 0, 0)  # only the first word counts
    assert isinstance(admit(quotas, one, 0.0, input_tokens=900, output_tokens=950), Lease)
    assert isinstance(admit(quotas, one, 0.0, input_tokens=1), RequestError)


def test_a_request_larger_than_the_limit_waits_for_all_of_it_and_then_owes() -> None:
    quotas, one = Quotas(), tenant(inputTokensPerMinute=1000)
    quotas.admit(one, 0.0, input_tokens=5000)
    refused = admit(quotas, one, 0.0, input_tokens=1)
    assert isinstance(refused, RequestError)
    assert refused.retry_after == pytest.approx(240, abs=1)


def test_a_refused_request_uses_nothing() -> None:
    quotas, one = Quotas(), tenant(requestsPerMinute=10, inputTokensPerMinute=100, concurrency=50)
    quotas.admit(one, 0.0, input_tokens=100)
    for _ in range(20):
        assert isinstance(admit(quotas, one, 0.0, input_tokens=50), RequestError)
    lease = quotas.admit(one, 60.0)
    assert b"remaining-requests: 9" in lease.headers


def test_concurrency_counts_what_runs() -> None:
    quotas, one = Quotas(), tenant(concurrency=2)
    first = quotas.admit(one, 0.0)
    quotas.admit(one, 0.0)
    refused = admit(quotas, one, 0.0)
    assert isinstance(refused, RequestError)
    assert refused.status == 429
    first.settle(0.0)
    first.settle(0.0)
    assert isinstance(admit(quotas, one, 0.0), Lease)
    assert isinstance(admit(quotas, one, 0.0), RequestError)


def test_use_survives_a_reread_with_other_limits() -> None:
    quotas = Quotas()
    quotas.admit(tenant(requestsPerMinute=60), 0.0)
    for _ in range(29):
        quotas.admit(tenant(requestsPerMinute=60), 0.0)
    # Half of the minute's allowance is used; it still is under the new limit.
    assert b"remaining-requests: 59" in quotas.admit(tenant(requestsPerMinute=120), 0.0).headers


def test_nobody_owes_more_than_ten_minutes() -> None:
    quotas, one = Quotas(), tenant(inputTokensPerMinute=10)
    quotas.admit(one, 0.0).settle(0.0, 1_000_000, 0)
    refused = admit(quotas, one, 0.0, input_tokens=1)
    assert isinstance(refused, RequestError)
    assert refused.retry_after == pytest.approx(546)
    assert isinstance(admit(quotas, one, 546.0, input_tokens=1), Lease)


def test_without_limits_there_are_no_headers() -> None:
    assert Quotas().admit(tenant(), 0.0).headers == b""


def test_workers_share_limits_through_memory() -> None:
    tags, rates, charged = (memoryview(bytearray(8 * size)) for size in (4, 4 * RATES, 8 * RATES))
    running, elsewhere = (memoryview(bytearray(4 * size)).cast("i") for size in (8, 4))
    cells = tags.cast("q"), rates.cast("d"), running, elsewhere, charged.cast("d")
    one, other = (Quotas(TenantRows(*cells, workers=2, worker=worker)) for worker in range(2))
    strict = tenant(requestsPerMinute=10, concurrency=10)
    leases = [(one if number % 2 else other).admit(strict, 5.0) for number in range(10)]
    assert isinstance(admit(one, strict, 5.0), RequestError)
    assert isinstance(admit(other, strict, 65.0), RequestError)  # all ten still run
    leases[0].settle(65.0)
    assert isinstance(admit(one, strict, 65.0), Lease)


def test_tenants_never_share_a_row_while_there_are_rows() -> None:
    rows = TenantRows.private()
    assert len({rows.row(f"tenant-{number}") for number in range(1000)}) == 1000
    assert rows.row("tenant-7") == rows.row("tenant-7")


@given(
    st.integers(200, 1000),
    st.lists(
        st.tuples(st.floats(0, 30), st.integers(0, 500), st.one_of(st.none(), st.integers(0, 800))),
        max_size=30,
    ),
)
def test_no_minute_has_more_than_the_allowance_and_its_refill(
    limit: int, steps: list[tuple[float, int, int | None]]
) -> None:
    quotas, one = Quotas(), tenant(inputTokensPerMinute=limit)
    now, granted = 1000.0, 0.0
    for pause, reserved, used in steps:
        now += pause
        lease = admit(quotas, one, now, input_tokens=reserved)
        if isinstance(lease, RequestError):
            assert lease.retry_after is not None
            assert lease.retry_after > 0
            # It is right: a moment later than said the same request is admitted.
            now += lease.retry_after + 1e-3
            lease = quotas.admit(one, now, input_tokens=reserved)
        # At most one request beyond the allowance: the one that is larger than it or turned out to be.
        assert granted <= limit * (1 + (now - 1000.0) / 60) + 1e-3 * limit
        lease.settle(now, used)
        granted += reserved if used is None else used
        granted = max(granted, limit * (now - 1000.0) / 60)


def test_estimate_counts_four_bytes_a_token() -> None:
    assert estimate_tokens(4000) == 1000
