"""What was delivered of a stream."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.router_policies.streams import TOKENS, chat_chunk, chat_stream, delivered, prefix, sse

from modelfleet_serving.router.continuation import (
    MAX_TEXT,
    NotContinuableError,
    Recorder,
    continue_stream,
)
from modelfleet_serving.router.policy.events import data_of, events
from modelfleet_serving.router.relay import frame


@given(st.lists(st.text(min_size=1, max_size=400), max_size=300), st.booleans(), st.data())
def test_recorder_finds_the_text_however_the_stream_was_cut(
    tokens: list[str], chunked: bool, data: st.DataObject
) -> None:
    payload = chat_stream(tokens, prompt=9)
    pieces = list(events(payload))
    recorder = Recorder(chunked=chunked)
    if chunked:
        for event in pieces:
            recorder.add(frame(event))
    else:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=8)))
        for start, end in zip([0, *cuts], [*cuts, len(payload)], strict=True):
            recorder.add(payload[start:end])
    found = recorder.read()
    assert found is not None
    assert (found.text, found.tokens, found.prompt_tokens) == ("".join(tokens), len(tokens), 9)
    assert found.done
    assert found.finish_reason == "stop"
    assert recorder.read() is found


def test_recorder_keeps_text_and_not_chunks() -> None:
    recorder = Recorder(chunked=True)
    event = frame(chat_chunk({"content": "word "}))
    for _ in range(5000):
        recorder.add(event)
    assert len(recorder.kept) <= 140_000
    found = recorder.read()
    assert found is not None
    assert found.text == "word " * 5000
    assert sum(map(sys.getsizeof, found._settled)) < 2 * found.size
    assert not found._texts
    assert found.tokens == 5000


def test_recorder_gives_up_on_too_much_text_and_frees_it() -> None:
    recorder = Recorder(chunked=False)
    for _ in range(MAX_TEXT // 20_000 + 3):
        recorder.add(chat_chunk({"content": "x" * 20_000}))
    assert recorder.read() is None
    recorder.add(chat_chunk({"content": "more"}))
    assert not recorder.kept


def test_a_chunk_of_http_that_ends_within_an_event_is_read_too() -> None:
    recorder = Recorder(chunked=True)
    payload = chat_stream(TOKENS)
    for end in range(0, len(payload), 7):
        recorder.add(frame(payload[end : end + 7]))
    found = recorder.read()
    assert found is not None
    assert found.text == "".join(TOKENS)
    assert found.tokens == 6


@pytest.mark.parametrize(
    "event", [b"data:%b\r\n\r\n", b"event: x\ndata: %b\nid: 1\n\n", b": data: no\n\ndata: %b\n\n"]
)
def test_other_forms_of_events_are_read_too(event: bytes) -> None:
    recorder = Recorder(chunked=False)
    for token in TOKENS:
        recorder.add(event.replace(b"%b", data_of(chat_chunk({"content": token}))))
    found = recorder.read()
    assert found is not None
    assert found.text == "".join(TOKENS)


@pytest.mark.parametrize(
    "rubbish", [b"data: {not json}\n\n", b'data: {"choices": 5}\n\n', b"data: \xff\xfe\n\n", b"data: []\n\n"]
)
def test_recorder_gives_up_on_what_it_can_not_read(rubbish: bytes) -> None:
    recorder = Recorder(chunked=False)
    recorder.add(prefix(2) + rubbish)
    assert recorder.read() is None
    with pytest.raises(NotContinuableError, match="unreadable"):
        continue_stream(True, b"{}", None, source="a", target="b")


def test_tokens_are_exact_where_the_engine_tells_them() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}
    found = delivered(chat_chunk({"content": "several tokens at once"}, usage=usage))
    assert (found.tokens, found.prompt_tokens) == (9, 4)
    choice = {"index": 0, "delta": {"content": "three tokens here"}, "token_ids": [1, 2, 3]}
    assert delivered(sse({"id": "x", "choices": [choice]})).tokens == 3
