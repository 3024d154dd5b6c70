"""The table of prefixes in C does what the one in Python does, on the same memory."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfleet_serving.router import wire
from modelfleet_serving.router.policy.prefix_table import PrefixTable

# Few buckets and few hashes, so that they meet; the lowest bits choose the bucket and tell no hashes apart.
HASHES = st.integers(0, 5).map(lambda number: number << 16 | number % 3) | st.integers(0, 2**64 - 1)
CODES = st.integers(1, 4) | st.sampled_from((0xFF, 0x100, 0xFFFF))
PROMPTS = st.lists(HASHES, max_size=12)
CALLS = st.lists(
    st.tuples(st.just("add"), HASHES, CODES)
    | st.tuples(st.just("record"), PROMPTS, CODES)
    | st.tuples(st.just("holders"), HASHES)
    | st.tuples(
        st.just("deepest"),
        PROMPTS,
        st.integers(0, 12),
        st.dictionaries(CODES, st.integers(0, 3), max_size=4),
        st.sets(st.integers(0, 3), max_size=3),
    ),
    max_size=40,
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "Prefixes", None)


@pytest.mark.usefixtures("plain")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS, size=st.sampled_from((64, 256)))
def test_both_tables_answer_and_remember_alike(
    compiled: ModuleType, calls: list[tuple[Any, ...]], size: int
) -> None:
    memories = bytearray(size), bytearray(size)
    slow, quick = PrefixTable(memories[0]), compiled.Prefixes(memories[1])
    for name, *arguments in calls:
        if name == "deepest":
            arguments[1] = min(arguments[1], len(arguments[0]))
        assert getattr(quick, name)(*arguments) == getattr(slow, name)(*arguments)
        assert memories[0] == memories[1]


def test_the_quick_one_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch, compiled: ModuleType) -> None:
    monkeypatch.setattr(wire, "Prefixes", compiled.Prefixes)
    memory = bytearray(128)
    table = PrefixTable(memory)
    table.record([1 << 16, 2 << 16, 3 << 16], 7)
    assert table.deepest([1 << 16, 2 << 16, 9 << 16], 3, {7: 0}, set()) == (1, [0])
    assert (table.holders(2 << 16), table.add(2 << 16, 7)) == ([7], 1)
    with pytest.raises(BufferError):
        memory.clear()  # it is held
    with pytest.raises(ValueError, match="power of two"):
        PrefixTable(bytearray(96))


@pytest.mark.parametrize("memory", [bytearray(), bytearray(32), bytearray(96), b"\0" * 64, "text", None])
def test_other_memory_is_refused(compiled: ModuleType, memory: Any) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        compiled.Prefixes(memory)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add", ()),
        ("add", (1,)),
        ("add", (1, 0)),
        ("add", (1, 0x10000)),
        ("add", (-1, 1)),
        ("add", (2**64, 1)),
        ("add", ("1", 1)),
        ("record", ((1,), 1)),
        ("record", ([1, "2"], 1)),
        ("record", ([1], 0)),
        ("holders", (-1,)),
        ("deepest", ([1], 1, {})),
        ("deepest", ([1], 2, {}, set())),
        ("deepest", ([1], "1", {}, set())),
        ("deepest", ([-1], 1, {}, set())),
        ("deepest", ((1,), 1, {}, set())),
        ("deepest", ([1], 1, [], set())),
        ("deepest", ([1], 1, {}, [])),
    ],
)
def test_wrong_calls_are_refused_and_nothing_leaks(
    compiled: ModuleType, name: str, arguments: tuple[Any, ...]
) -> None:
    table = compiled.Prefixes(bytearray(64))
    with pytest.raises((TypeError, ValueError, OverflowError, IndexError)):
        getattr(table, name)(*arguments)


def test_its_memory_is_given_back(compiled: ModuleType) -> None:
    memory, index, hashes = bytearray(64), object(), [1 << 16]
    before = sys.getrefcount(index), sys.getrefcount(hashes)
    table = compiled.Prefixes(memory)
    table.record(hashes, 7)
    for _ in range(1000):
        assert table.deepest(hashes, 1, {7: index}, set()) == (0, [index])
    assert (sys.getrefcount(index), sys.getrefcount(hashes)) == before
    del table
    memory.clear()
