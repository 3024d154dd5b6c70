"""What C counts for each request is what Python counts."""

from __future__ import annotations

import base64
import math
from array import array
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from modelfleet_serving.router import wire
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.policy import fingerprint as prints
from modelfleet_serving.router.policy.load import readable_bytes
from modelfleet_serving.router.policy.quota import HIGHEST, RATES, Limits, Quotas, TenantRows
from modelfleet_serving.router.usage import read_usage

often = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Does everything in Python, also where the data path is compiled."""
    for name in ("readable_bytes", "usual_usage", "charge"):
        monkeypatch.setattr(wire, name, None)
    return monkeypatch


# --- Hashes ---


@often
@given(
    size=st.integers(0, 40_000),
    before=st.integers(0, 9),
    seed=st.integers(0, 2**64 - 1),
    fill=st.binary(max_size=50),
)
def test_blocks_have_the_librarys_hashes(
    compiled: ModuleType, size: int, before: int, seed: int, fill: bytes
) -> None:
    data = (fill * (size // max(1, len(fill)) + 1))[:size]
    view = memoryview(b"x" * before + data)[before:]
    hashes, start = [], 0
    for end in prints.ENDS:
        if end > len(data):
            break
        seed_of_block = hashes[-1] if hashes else seed
        hashes.append(xxh64_intdigest(data[start:end], seed_of_block))
        start = end
    assert compiled.hash_blocks(view, size, seed, array("q", prints.ENDS)) == hashes


@pytest.mark.parametrize(
    "arguments",
    [
        (b"", 0, 0),
        ("text", 4, 0, array("q", [32])),
        (b"x" * 64, 64, -1, array("q", [32])),
        (b"x" * 64, 64, 2**64, array("q", [32])),
        (b"x" * 64, 64, 0, array("d", [32])),
        (b"x" * 64, 64, 0, array("q", [33])),
        (b"x" * 64, 64, 0, array("q", [32, 32])),
        (b"x" * 64, 64, 0, array("q", [-32])),
        (b"x" * 64, 64, 0, [32]),
    ],
)
def test_other_blocks_are_refused(compiled: ModuleType, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        compiled.hash_blocks(*arguments)


def test_no_more_is_hashed_than_there_is(compiled: ModuleType) -> None:
    ends = array("q", [32, 64, 96])
    assert len(compiled.hash_blocks(b"x" * 64, 10**9, 0, ends)) == 2
    assert len(compiled.hash_blocks(b"x" * 64, 63, 0, ends)) == 1
    assert compiled.hash_blocks(b"x" * 64, -5, 0, ends) == []


# --- Sizes ---

PARTS = st.sampled_from(
    (
        b"word and ",
        b'"',
        b"\\n",
        "ü".encode(),
        b"A" * 700,
        base64.b64encode(bytes(range(256)) * 30),
        b"\xff" * 500,
    )
)


@pytest.mark.usefixtures("python")
@often
@given(parts=st.lists(st.tuples(PARTS, st.integers(1, 60)), max_size=8), start=st.integers(0, 600))
def test_media_weigh_the_same(compiled: ModuleType, parts: list[tuple[bytes, int]], start: int) -> None:
    data = b"".join(part * times for part, times in parts)
    start = min(start, len(data))
    assert compiled.readable_bytes(data, start) == readable_bytes(data, start)


NUMBERS = st.integers(0, 10**18).map(str) | st.sampled_from(("", "-1", "null", "007"))
USAGES = st.builds(
    lambda form, one, two, three: form.replace("A", one).replace("B", two).replace("C", three),
    st.sampled_from(
        (
            '"usage":{"prompt_tokens":A,"total_tokens":B,"completion_tokens":C}',
            '"usage":{"prompt_tokens":A,"completion_tokens":C,"total_tokens":B}',
            '"usage":{"prompt_tokens":A,"completion_tokens":C',
            '"usage":{"prompt_tokens":A',
            '"usage":null',
            '"usage": {"prompt_tokens": A, "completion_tokens": C}',
            '"usage":{"input_tokens":A,"output_tokens":C}',
            '"usage"',
            '"usag',
        )
    ),
    NUMBERS,
    NUMBERS,
    NUMBERS,
)


@often
@given(pieces=st.lists(USAGES | st.sampled_from(("{}", ",", '{"choices":[]},')), max_size=4))
def test_usage_is_read_alike(compiled: ModuleType, pieces: list[str]) -> None:
    data = "".join(pieces).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "usual_usage", None)
        slowly = read_usage(data)
        patch.setattr(wire, "usual_usage", compiled.usual_usage)
        assert read_usage(data) == slowly


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("readable_bytes", (b"x",)),
        ("readable_bytes", ("x", 0)),
        ("readable_bytes", (b"x", -1)),
        ("readable_bytes", (b"x", 2)),
        ("readable_bytes", (b"x", "0")),
        ("usual_usage", ("x",)),
    ],
)
def test_wrong_calls_are_refused(compiled: ModuleType, name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        getattr(compiled, name)(*arguments)


# --- Limits ---

RATE = st.none() | st.integers(1, 5000) | st.sampled_from((10**9, HIGHEST))
STEPS = st.lists(
    st.tuples(st.floats(0, 70), st.integers(0, 3000), st.integers(0, 3000)), min_size=1, max_size=30
)


def rows(number: int, workers: int, worker: int) -> TenantRows:
    def cells(kind: str, count: int) -> Any:
        return memoryview(bytearray(8 * count)).cast("B").cast(kind)

    return TenantRows(
        cells("q", number),
        cells("d", number * RATES),
        cells("q", number * workers),
        cells("q", number),
        cells("d", number * RATES * workers),
        workers,
        worker,
    )


def outcome(quotas: Quotas, limits: Limits, now: float, read: int, written: int) -> tuple[Any, ...]:
    try:
        return ("granted", quotas.admit(limits, now, read, written).headers)
    except RequestError as error:
        return ("refused", str(error), error.extra_headers())


@often
@given(rates=st.tuples(RATE, RATE, RATE), steps=STEPS, workers=st.integers(1, 3))
def test_requests_are_granted_and_charged_alike(
    compiled: ModuleType,
    rates: tuple[int | None, int | None, int | None],
    steps: list[Any],
    workers: int,
) -> None:
    limits = Limits("team", rates, None)
    tables = rows(5, workers, workers - 1), rows(5, workers, workers - 1)
    slow, quick = Quotas(tables[0]), Quotas(tables[1])
    now = 1000.0
    with pytest.MonkeyPatch.context() as patch:
        for seconds, read, written in steps:
            now += seconds
            patch.setattr(wire, "charge", None)
            expected = outcome(slow, limits, now, read, written)
            patch.setattr(wire, "charge", compiled.charge)
            assert outcome(quick, limits, now, read, written) == expected
            assert tables[0].rates.tolist() == pytest.approx(tables[1].rates.tolist(), abs=1e-6)
            assert tables[0].charged.tolist() == pytest.approx(tables[1].charged.tolist(), abs=1e-6)


def cells(*numbers: float) -> Any:
    return memoryview(array("d", numbers))


GOOD: tuple[Any, ...] = (
    cells(0, 0, 0), cells(0, 0, 0), 0, 1, 0, 1.0, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), [(b"left: ", b" in ")] * 3
)  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"\0" * 24),
        (1, cells(0, 0)),
        (2, 1),
        (2, -1),
        (3, 0),
        (4, 1),
        (4, -1),
        (5, "now"),
        (6, (1.0, 0.0)),
        (6, [1.0, 0.0, 0.0]),
        (7, ("a", "b", "c")),
        (8, ()),
        (8, []),
        (8, [b"left: "] * 3),
        (8, [("left", "in")] * 3),
        (8, [(b"x" * 1000, b"")] * 3),
    ],
)
def test_charges_to_nobody_are_refused(compiled: ModuleType, place: int, value: Any) -> None:
    assert compiled.charge(*GOOD) == b"left: 59 in 1s\r\n"
    arguments = list(GOOD)
    arguments[place] = value
    GOOD[0][0] = 0
    with pytest.raises((TypeError, ValueError, IndexError, BufferError)):
        compiled.charge(*arguments)
    GOOD[0][0] = 0
    assert math.isfinite(GOOD[1][0])
