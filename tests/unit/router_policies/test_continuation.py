"""A stream that goes on with another replica."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.router_policies.streams import (
    CHAT,
    TOKENS,
    chat_chunk,
    chat_stream,
    delivered,
    go_on,
    prefix,
    read,
    refused,
    request,
    sse,
    text_of,
    usage_chunk,
)

from modelfleet_serving.router.continuation import (
    NotContinuableError,
    Recorder,
    continue_stream,
)
from modelfleet_serving.router.policy.events import events


def test_a_chat_goes_on_as_an_unfinished_assistant_message() -> None:
    sent = request(go_on(prefix(3)))
    assert sent["messages"] == [*CHAT["messages"], {"role": "assistant", "content": "one two three"}]
    assert sent["continue_final_message"] is True
    assert sent["add_generation_prompt"] is False
    assert sent["max_tokens"] == 17
    assert sent["seed"] == 7
    assert sent["stream"] is True


def test_numbers_and_unknown_members_pass_unchanged() -> None:
    body = b'{"model":"m","messages":[],"x":12345678901234567890123,"temperature":0.10000000000000001}'
    going_on = continue_stream(True, body, delivered(prefix(1)), source="a", target="b")
    assert going_on.body is not None
    assert b'"x":12345678901234567890123' in going_on.body
    assert b'"temperature":0.10000000000000001' in going_on.body


def test_a_message_that_the_client_had_continued_grows() -> None:
    for content, grown in (
        ("Sure:", "Sure:one"),
        (
            [{"type": "text", "text": "Sure:"}],
            [{"type": "text", "text": "Sure:"}, {"type": "text", "text": "one"}],
        ),
    ):
        messages = [*CHAT["messages"], {"role": "assistant", "content": content}]
        sent = request(go_on(prefix(1), {**CHAT, "messages": messages, "continue_final_message": True}))
        assert sent["messages"] == [*CHAT["messages"], {"role": "assistant", "content": grown}]


def test_a_completion_goes_on_from_prompt_and_text() -> None:
    payload = b"".join(
        sse({"id": "cmpl-1", "choices": [{"index": 0, "text": token}]}) for token in TOKENS[:2]
    )
    for prompt in ("Count: ", ["Count: "]):
        body = {"model": "m", "prompt": prompt, "max_tokens": 10, "min_tokens": 1, "stream": True}
        sent = request(go_on(payload, body, chat=False))
        assert (sent["prompt"], sent["max_tokens"], sent["min_tokens"]) == ("Count: one two", 8, 0)
    for prompt in ([1, 2, 3], ["a", "b"], [[1], [2]], None):
        assert refused(payload, {"model": "m", "prompt": prompt}, chat=False) == "prompt"


def test_before_any_text_the_request_is_made_again_whatever_it_asks_for() -> None:
    body = {**CHAT, "n": 2, "response_format": {"type": "json_object"}, "logprobs": True}
    for payload in (b"", prefix(0), b": comment\n\n"):
        going_on = go_on(payload, body)
        assert request(going_on) == body
        out = going_on.splice.feed(chat_stream(TOKENS, "chatcmpl-2"))
        roles = [choice["delta"].get("role") for chunk in read(out) for choice in chunk["choices"]]
        assert roles.count("assistant") == (0 if payload == prefix(0) else 1)
        assert text_of(out) == "".join(TOKENS)
        assert read(out)[-1]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 2}, "choices"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "structured_output"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_output"),
        ({"guided_json": {"type": "object"}}, "structured_output"),
        ({"tool_choice": "required"}, "tool_call"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_call"),
        ({"use_beam_search": True}, "beam_search"),
        ({"best_of": 3}, "choices"),
        ({"echo": True}, "echo"),
        ({"modalities": ["text", "audio"]}, "audio"),
    ],
)
def test_requests_that_are_not_continued(changes: dict[str, Any], reason: str) -> None:
    assert refused(prefix(2), {**CHAT, **changes}) == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 1, "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}},
        {"tools": [{"type": "function"}], "tool_choice": "auto", "logprobs": None},
        {"stop": ["\n"], "presence_penalty": 0.5, "logit_bias": {"5": -100}},
    ],
)
def test_requests_that_are_continued(changes: dict[str, Any]) -> None:
    assert go_on(prefix(2), {**CHAT, **changes}).body is not None


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        ({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}, "tool_call"),
        ({"reasoning_content": "Let me think"}, "reasoning"),
        ({"reasoning": "Let me think"}, "reasoning"),
        ({"refusal": "I can't"}, "refusal"),
    ],
)
def test_answers_that_are_not_continued(delta: dict[str, Any], reason: str) -> None:
    assert refused(prefix(0) + chat_chunk(delta)) == reason
    assert refused(prefix(0) + chat_chunk(delta) + chat_chunk({"content": "text"})) == reason


def test_a_stream_that_only_lacks_its_end_gets_it_without_a_replica() -> None:
    whole = chat_stream(TOKENS)
    finished = whole[: whole.index(b'"stop"')] + b'"stop"}]}\n\n'
    going_on = go_on(finished)
    assert (going_on.body, going_on.closing) == (None, b"data: [DONE]\n\n")
    assert go_on(whole).closing == b""


def test_a_stream_that_has_had_all_its_tokens_ends_by_length() -> None:
    going_on = go_on(prefix(3), {**CHAT, "max_tokens": None, "max_completion_tokens": 3})
    assert going_on.body is None
    chunk = read(going_on.closing)[0]
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert chunk["id"] == "chatcmpl-1"
    assert going_on.closing.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"messages": 5}', b'{"messages": [}'])
def test_a_body_that_is_no_request_is_not_continued(body: bytes) -> None:
    with pytest.raises(NotContinuableError, match="request"):
        continue_stream(True, body, delivered(prefix(2)), source="a", target="b")


# --- The rest of the stream ---


@given(st.integers(1, 6), st.lists(st.integers(0, 4000), max_size=10))
def test_the_client_sees_one_stream(count: int, cuts: list[int]) -> None:
    going_on = go_on(prefix(count))
    second = chat_stream(TOKENS[count:], "chatcmpl-other", prompt=12 + count)
    places = sorted({min(cut, len(second)) for cut in cuts})
    out = b"".join(
        going_on.splice.feed(second[start:end])
        for start, end in zip([0, *places], [*places, len(second)], strict=True)
    )
    chunks = read(prefix(count) + out)
    assert text_of(prefix(count) + out) == "one two three four five six"
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-1"}
    roles = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert len(roles) == 1
    assert chunks[-1]["usage"] == {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "stop"
    assert out.endswith(b": modelfleet continued from=r1 to=r2\n\ndata: [DONE]\n\n")
    assert out.count(b"[DONE]") == 1
    assert going_on.splice.diverged is None


def test_a_continued_stream_can_be_continued_again() -> None:
    recorder = Recorder(chunked=False)
    recorder.add(prefix(2))
    body = json.dumps(CHAT).encode()
    first = continue_stream(True, body, recorder.read(), source="r1", target="r2")
    second = list(events(chat_stream(TOKENS[2:], "chatcmpl-2", prompt=14)))[:3]
    recorder.add(first.splice.feed(b"".join(second)))
    again = continue_stream(True, body, recorder.read(), source="r2", target="r3")
    assert request(again)["messages"][-1]["content"] == "one two three four"
    assert request(again)["max_tokens"] == 16
    out = again.splice.feed(chat_stream(TOKENS[4:], "chatcmpl-3", prompt=16))
    assert read(out)[-1]["usage"] == {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}
    assert b"from=r2 to=r3" in out


def test_usage_of_every_chunk_is_corrected_and_cached_tokens_stay_below_the_prompt() -> None:
    first = prefix(0) + chat_chunk(
        {"content": "one"}, usage={"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13}
    )
    splice = go_on(first).splice
    out = splice.feed(
        chat_chunk(
            {"content": " two"}, usage={"prompt_tokens": 14, "completion_tokens": 1, "total_tokens": 15}
        )
        + usage_chunk(14, 1, prompt_tokens_details={"cached_tokens": 13})
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in read(out)] == [2, 2]
    assert [chunk["usage"]["prompt_tokens"] for chunk in read(out)] == [12, 12]
    assert read(out)[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 12}


@pytest.mark.parametrize(
    ("said", "sent", "rest", "expected"),
    [
        (["one", " "], "one", [" two"], "one two"),
        (["one", "\n\n"], "one", ["\n", "\n", "two"], "one\n\ntwo"),
        (["one", "\n"], "one", ["\n\ntwo"], "one\n\ntwo"),
        (["one "], "one", ["two"], "one two"),
        (["one "], "one", ["\ntwo"], "one \ntwo"),
        ([" \n"], None, [" ", "\none"], " \none"),
    ],
)
def test_white_space_at_the_seam_is_neither_sent_nor_repeated(
    said: list[str], sent: str | None, rest: list[str], expected: str
) -> None:
    first = prefix(0) + b"".join(chat_chunk({"content": token}) for token in said)
    going_on = go_on(first)
    messages = request(going_on)["messages"]
    assert messages[-1]["content"] == (sent or CHAT["messages"][-1]["content"])
    assert text_of(first + going_on.splice.feed(chat_stream(rest))) == expected


def test_a_second_replica_that_reasons_diverges() -> None:
    splice = go_on(prefix(2)).splice
    assert splice.feed(chat_chunk({"reasoning_content": "Hmm"})) == b""
    assert splice.diverged == "reasoning"


def test_comments_and_errors_of_the_second_replica_pass() -> None:
    splice = go_on(prefix(2)).splice
    for event in (b": ping\n\n", b'data: {"error":{"message":"no"}}\n\n'):
        assert splice.feed(event) == event
    assert splice.feed(b"data: {broken}\n\n") == b""
    assert splice.diverged == "unreadable"
