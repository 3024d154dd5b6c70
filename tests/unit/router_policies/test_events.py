"""Events and usage of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.router_policies.streams import TOKENS, chat_chunk, chat_stream, usage_chunk

from modelfleet_serving.router.continuation import (
    ask_usage,
    may_hold_usage,
    strip_usage,
)
from modelfleet_serving.router.policy.events import EventSplitter, data_of


@given(
    st.lists(
        st.sampled_from([b"data: a\n\n", b"data: b\r\n\r\n", b": c\n\n", b"event: x\ndata: y\ndata: z\n\n"])
    ),
    st.data(),
)
def test_splitter_gives_whole_events_however_they_are_cut(parts: list[bytes], data: st.DataObject) -> None:
    payload = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=10)))
    splitter = EventSplitter()
    whole = [
        event
        for start, end in zip([0, *cuts], [*cuts, len(payload)], strict=True)
        for event in splitter.feed(payload[start:end])
    ]
    assert whole == parts
    assert splitter.pending == 0


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\r\n\r\n", b"a"),
        (b"event: x\ndata: y\ndata: z\n\n", b"y\nz"),
        (b"data: y\nid: 5\n\n", b"y"),
        (b": comment\n\n", b""),
        (b"data: y\nb\n\n", b"y"),
    ],
)
def test_data_of_an_event(event: bytes, data: bytes) -> None:
    assert data_of(event) == data


@pytest.mark.parametrize(
    ("body", "options", "added"),
    [
        ({"model": "m", "stream": True}, None, True),
        ({"model": "m", "stream_options": {"include_usage": True}}, {"include_usage": True}, False),
        (
            {"model": "m", "stream_options": {"include_usage": False, "x": 1}},
            {"include_usage": True, "x": 1},
            True,
        ),
        ({"model": "m", "stream_options": {}}, {"include_usage": True}, True),
        ({"stream_options": None, "model": "m"}, {"include_usage": True}, True),
        ({"stream_options": "rubbish", "model": "m"}, "rubbish", False),
        ({"stream_options": {"include_usage": "yes"}, "model": "m"}, {"include_usage": "yes"}, False),
    ],
)
@pytest.mark.parametrize("end", [b"", b" \r\n"])
def test_usage_is_asked_for_once(body: dict[str, Any], options: Any, added: bool, end: bytes) -> None:
    raw = json.dumps(body["stream_options"]).encode() if "stream_options" in body else b""
    changed, was_added = ask_usage(json.dumps(body).encode() + end, raw)
    pairs: list[tuple[str, Any]] = json.loads(changed, object_pairs_hook=list)
    names = [name for name, _ in pairs]
    assert was_added == added
    assert len(set(names)) == len(names)
    assert json.loads(changed)["stream_options"] == (options or {"include_usage": True})
    assert {name: value for name, value in json.loads(changed).items() if name != "stream_options"} == {
        name: value for name, value in body.items() if name != "stream_options"
    }


def test_only_the_event_with_nothing_but_usage_is_stripped() -> None:
    whole = chat_stream(TOKENS)
    stripped = strip_usage(whole)
    assert may_hold_usage(whole)
    assert stripped == whole.replace(usage_chunk(12, 6), b"")
    with_choices = chat_chunk({"content": 'say "usage"'}, usage={"prompt_tokens": 1})
    for kept in (with_choices, b'data: "usage"\n\n', b'data: {"usage": broken\n\n', b": comment\n\n"):
        assert strip_usage(kept) == kept
