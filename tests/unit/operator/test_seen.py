"""Which events tell of a change: a status that the operator wrote itself is none."""

from __future__ import annotations

from typing import Any

import pytest

from modelfleet_operator.seen import is_same


def body(generation: int = 1, *rows: dict[str, Any], **metadata: str) -> dict[str, Any]:
    status = {"status": {"variants": [{"name": "a", **row} for row in rows]}} if rows else {}
    return {"metadata": {"generation": generation, **metadata}, **status}


MEASURED = {"measurements": [{"accelerator": "A10", "kvCacheTokens": 41_000}]}


@pytest.mark.parametrize("before", [body(), body(1, {"reason": "Deploying"})])
def test_an_own_status_is_no_change(before: dict[str, Any]) -> None:
    assert is_same(body(1, {"reason": "Serving"}), before)


@pytest.mark.parametrize(
    "now", [body(2), body(1, deletionTimestamp="2026-01-01T00:00:00Z"), body(1, MEASURED)]
)
def test_a_spec_a_deletion_and_a_measurement_are_changes(now: dict[str, Any]) -> None:
    assert not is_same(now, body())
