"""What reaches the fleet: a status that the operator wrote itself is no change, and watches never end."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from modelfleet_operator.handlers import LONGEST_PAUSE, kopf_settings
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


def test_a_watch_is_tried_again_for_ever_and_soon() -> None:
    pauses = kopf_settings().networking.error_backoffs
    for _ in range(2):  # each call begins anew
        tried = list(islice(iter(pauses), 1000))
        assert len(tried) == 1000
        assert max(tried) == LONGEST_PAUSE
        assert tried[0] < 1
