"""Any table that passes its checks can be taken over, and any request be routed by it."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfleet_serving.contract import (
    Affinity,
    Endpoint,
    EndpointState,
    ModelRoute,
    QueueSettings,
    VariantRoute,
)
from modelfleet_serving.router.checks import TableCheck
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.table import Table

NAMES = st.sampled_from(
    ["a", "b", "m", "m:a", ":", "a:", "x/y", "é", "", " ", "a\r\nx: y", "\x00", "a" * 300]
)
NUMBERS = st.sampled_from([-1, 0, 1, 7, 100, 2**31, 2**62])
URLS = st.sampled_from(
    [
        "http://127.0.0.1:1",
        "https://engine",
        "http://[::1]:8000/base/",
        "http://user:secret@h:1",
        "http://h:1/é",
        "http://é:1",
        "http://h:1/a b",
        "http://h:1/\r\nx",
        "http://h\r\nx:1",
        "http://:80",
        "http://h:0",
        "http://h:99999",
        "http://h:1?x",
        "ftp://h",
        "",
        "http://h:1//",
        "http://[::1",
        "http://" + "a" * 300 + ":1",
    ]
)
ENDPOINTS = st.builds(
    Endpoint,
    id=NAMES,
    url=URLS,
    state=st.sampled_from(EndpointState),
    revision=NAMES,
    capacity=st.none() | NUMBERS,
    adapters=st.lists(NAMES, max_size=2),
)
VARIANTS = st.builds(
    VariantRoute,
    name=NAMES,
    endpoints=st.lists(ENDPOINTS, max_size=4),
    revision_weights=st.dictionaries(NAMES, NUMBERS, max_size=3),
)
MODELS = st.builds(
    ModelRoute,
    name=NAMES,
    namespace=NAMES,
    weights=st.dictionaries(NAMES, NUMBERS, max_size=3),
    fallback=st.lists(NAMES, max_size=3),
    affinity=st.sampled_from(Affinity),
    queue=st.builds(
        QueueSettings, max_requests=NUMBERS, timeout_seconds=st.sampled_from([-1.0, 0.0, 1.0, 1e300])
    ),
    variants=st.lists(VARIANTS, max_size=3),
    adapters=st.lists(NAMES, max_size=2),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(MODELS, max_size=3))
def test_what_passes_the_checks_can_be_used(models: list[ModelRoute]) -> None:
    good = [model for model in models if not TableCheck().faults(model)]
    cells = array("i", [0] * 64)
    table = Table(lambda _: 1, lambda row: row)
    for model in good:
        table.put(model)
    table.publish()
    for model in good:
        target = table.resolve(model.name)
        for pin in (None, *target.model.variants):
            for variant in target.model.plan.order(pin):
                for endpoint in variant.endpoints:
                    head = endpoint.headers(target.name) + endpoint.request_tail + endpoint.path
                    assert head.count(b"\n") == head.count(b"\r\n")
                    assert b"\0" not in head
                    assert b"secret" not in head
                    assert b" " not in endpoint.path
        for name in ("nobody", f"{model.name}:nobody"):
            with pytest.raises(RequestError, match="nobody"):
                table.resolve(name)
    for model in good:
        table.remove(model.name)
    table.publish()
    assert not list(table.targets())
    assert not any(cells)


@settings(max_examples=40, deadline=None)
@given(st.lists(MODELS, max_size=2))
def test_every_fault_has_its_place(models: list[ModelRoute]) -> None:
    check = TableCheck()
    for fault in (fault for model in models for fault in check.faults(model)):
        assert fault.startswith("models[")
        assert "\n" not in fault
        assert "secret" not in fault
        msgspec.json.encode(fault)
