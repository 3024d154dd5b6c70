"""Tapes, in C and as bytearrays: what was appended is read again, whatever was between."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# About a block's size, and several of them: where an appended piece is cut.
SIZES = st.integers(0, 40) | st.integers(4000, 4100) | st.integers(8000, 13_000)
STEPS = st.lists(st.tuples(st.sampled_from(("append", "append", "append", "read", "clear")), SIZES))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, STEPS)
def test_it_does_what_a_bytearray_does(
    compiled: ModuleType, one: list[tuple[str, int]], other: list[tuple[str, int]]
) -> None:
    """Two at a time: each takes the blocks that the other gives back."""
    tapes: list[Any] = [compiled.Tape(), compiled.Tape()]
    plain = [bytearray(), bytearray()]
    turns = [(0, *step) for step in one] + [(1, *step) for step in other]
    for number, (which, step, size) in enumerate(turns[::2] + turns[1::2]):
        if step == "append":
            data = bytes([number % 256]) * size
            tapes[which] += data
            plain[which] += data
        elif step == "clear":
            tapes[which].clear()
            plain[which].clear()
        assert [bytes(tape) for tape in tapes] == plain
        assert [len(tape) for tape in tapes] == [len(kept) for kept in plain]
        assert bool(tapes[which]) == bool(plain[which])


@pytest.mark.parametrize("data", ["text", 7, None])
def test_only_bytes_are_appended(compiled: ModuleType, data: Any) -> None:
    tape = compiled.Tape()
    tape += b"before"
    with pytest.raises(TypeError):
        tape += data
    tape += memoryview(b" and after")
    assert bytes(tape) == b"before and after"


def test_more_than_is_kept_spare_comes_and_goes(compiled: ModuleType) -> None:
    data = bytes(range(256)) * 4096
    tapes = [compiled.Tape() for _ in range(8)]
    for _ in range(3):
        for index in range(len(tapes)):
            tapes[index] += data
        assert all(bytes(tape) == data for tape in tapes)
        for tape in tapes:
            tape.clear()
