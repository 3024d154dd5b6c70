from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfleet_serving.simulator.requests import (
    BadRequestError,
    ChatRequest,
    Message,
    chat_tokens,
    message_tokens,
    prompts,
    read,
)
from modelfleet_serving.simulator.text import (
    TOKENS,
    VOCABULARY,
    advance,
    instance,
    natural_length,
    start_state,
)
from modelfleet_serving.simulator.tokens import decode, encode


@settings(deadline=None)
@given(st.text())
def test_a_text_comes_back_from_its_tokens(text: str) -> None:
    assert decode(encode(text)) == text


@settings(deadline=None)
@given(st.text(max_size=50), st.text(max_size=50))
def test_a_common_beginning_has_common_tokens(text: str, more: str) -> None:
    whole = len(text.encode()) // 4
    assert encode(text)[:whole] == encode(text + more)[:whole]


@settings(deadline=None)
@given(st.lists(st.integers(-5, 1 << 62)))
def test_any_ids_can_be_decoded(tokens: list[int]) -> None:
    assert isinstance(decode(tokens), str)


def test_what_the_simulator_says_is_made_of_whole_tokens() -> None:
    assert all(len(piece) == 4 and piece.isascii() for piece in VOCABULARY)
    assert all(json.dumps(piece) == f'"{piece}"' for piece in VOCABULARY)
    sentence = "".join(VOCABULARY)
    assert encode(sentence) == list(TOKENS)


def test_a_text_can_be_continued_from_any_token() -> None:
    state = advance(start_state(0), encode("a prompt"))
    said = []
    states = [state]
    for _ in range(20):
        token = TOKENS[state >> 56]
        said.append(token)
        state = advance(state, (token,))
        states.append(state)
    for cut in range(20):
        assert advance(states[0], said[:cut]) == states[cut]
    assert len(set(said)) > 10


@settings(deadline=None)
@given(st.integers(0, (1 << 64) - 1), st.integers(1, 5000))
def test_natural_lengths_lie_around_their_mean(state: int, mean: int) -> None:
    assert max(1, mean // 2) <= natural_length(state, mean) <= mean + mean // 2 + 1


def test_a_continued_message_has_no_end_and_no_new_header() -> None:
    messages = [Message("user", "hello"), Message("assistant", "well met")]
    whole, _ = chat_tokens(ChatRequest(model="m", messages=messages))
    continued, start = chat_tokens(ChatRequest(model="m", messages=messages, continue_final_message=True))
    asked, begin = chat_tokens(ChatRequest(model="m", messages=messages[:1]))
    assert whole[: len(continued)] == continued
    assert continued[:begin] == asked
    assert start == begin
    assert decode(continued[start:]) == "well met"


def test_equal_pictures_have_equal_tokens() -> None:
    def picture(url: str) -> list[int]:
        return message_tokens(Message("user", [{"type": "image_url", "image_url": {"url": url}}]))

    assert picture("http://x/1.png") == picture("http://x/1.png")
    assert picture("http://x/1.png") != picture("http://x/2.png")
    assert len(picture("http://x/1.png")) == 256


def test_prompts_in_all_their_forms() -> None:
    assert prompts("abcd", "p") == [encode("abcd")]
    assert prompts([1, 2], "p") == [[1, 2]]
    assert prompts(["ab", [3, 4]], "p") == [encode("ab"), [3, 4]]
    for wrong in ([], [{"a": 1}], [[]], [[-1]]):
        with pytest.raises(BadRequestError):
            prompts(wrong, "p")


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(BadRequestError, match=r"\$\.max_tokens"):
        read(b'{"model":"m","messages":[],"max_tokens":0}', ChatRequest)
    with pytest.raises(BadRequestError, match="missing required field `messages`"):
        read(b'{"model":"m"}', ChatRequest)


def test_the_smallest_value_of_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 6},
            "kind": {"enum": ["a", "b"]},
            "size": {"type": ["integer", "null"], "minimum": 3},
            "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
            "other": {"anyOf": [{"const": 7}]},
        },
        "required": ["name"],
    }
    assert instance(schema) == {"name": "text..", "kind": "a", "size": 3, "parts": [True, True], "other": 7}
