"""What is read of bodies: the quick reader in C says what the other one does, or nothing."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfleet_serving.router.body import peek_json
from modelfleet_serving.router.errors import RequestError
from modelfleet_serving.router.peek import Peek, peek, rename

RAW = (
    "stream",
    "messages",
    "prompt",
    "input",
    "system",
    "tools",
    "stream_options",
    "previous_response_id",
    "max_tokens",
    "max_completion_tokens",
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(("model", *RAW, "temperature", "Model", "models", "")) | TEXTS
quickly = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def members(peeked: Peek) -> dict[str, Any]:
    return {"model": peeked.model} | {name: bytes(getattr(peeked, name)) for name in RAW}


def by_the_other_reader(body: bytes) -> dict[str, Any] | None:
    """The same by msgspec; ``None`` for a body that it refuses."""
    try:
        found = peek_json(body)
    except RequestError:
        return None
    return {"model": found.model} | {name: bytes(getattr(found, name)) for name in RAW}


def agree(module: ModuleType, body: bytes, *, before: bytes = b"") -> Peek | None:
    found = module.peek(before + body, len(before))
    if found is None:
        return None
    quick = Peek(found)
    assert members(quick) == by_the_other_reader(body)
    start, end = quick.span
    assert msgspec.json.decode(body[start:end]) == quick.model
    return quick


@quickly
@given(
    pairs=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    model=st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=40),
    place=st.integers(0, 6),
    indent=st.sampled_from((None, 0, 2)),
    escape=st.booleans(),
    before=st.binary(max_size=9),
)
def test_both_readers_see_the_same_in_whatever_a_client_may_send(
    compiled: ModuleType,
    pairs: list[tuple[str, Any]],
    model: str,
    place: int,
    indent: int | None,
    escape: bool,
    before: bytes,
) -> None:
    pairs.insert(place, ("model", model))
    encode = lambda value: json.dumps(value, indent=indent, ensure_ascii=escape)  # noqa: E731
    text = "{" + ",".join(f"{encode(name)}: {encode(value)}" for name, value in pairs) + "}\n"
    quick = agree(compiled, text.encode(), before=before)
    plain = all("\\" not in encode(name) for name, _ in pairs)
    named = [value for name, value in pairs if name == "model"]
    if plain and named == [model] and "\\" not in encode(model):
        assert quick is not None, "a plain body is read at once"


WHOLE = b'{"messages":[{"role":"user","content":"a\\u00e9\\ud83d\\ude00 \\n' + b"x" * 70 + b'"}],"model":"m",'
WHOLE += b'"max_tokens":-1.5e+3,"stream":true,"stop":null,"tools":[{},[],false]}'


@quickly
@given(place=st.integers(0, len(WHOLE) - 1), size=st.integers(0, 3), other=st.binary(max_size=3))
def test_a_broken_body_is_never_read_as_another(
    compiled: ModuleType, place: int, size: int, other: bytes
) -> None:
    agree(compiled, WHOLE[:place] + other + WHOLE[place + size :])


@pytest.mark.parametrize("place", [0, 1, 7, 15, 16, 31, 32, 47, 48, 63, 64, 95])
def test_no_place_in_a_text_hides_a_character(compiled: ModuleType, place: int) -> None:
    for special in (*range(0x20), 0x22, 0x5C):
        text = b"x" * place + bytes([special]) + b"y" * 40
        assert compiled.peek(b'{"prompt":"' + text + b'","model":"m"}', 0) is None
        agree(compiled, b'{"prompt":"' + text + b'","model":"m"}')
    escaped = b'{"prompt":"' + b"x" * place + b'\\" \\\\","model":"m"}'
    assert agree(compiled, escaped) is not None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'"model"',
        b'{"model":null}',
        b'{"model":1}',
        b'{"model":"a\\u0062"}',
        b'{"mod\\u0065l":"b","model":"a"}',
        b'{"model":"\xff"}',
        b'{"model":"m"',
        b'{"model":"m",}',
        b'{"model":"m"}}',
        b'{"model":"m"} x',
        b'{"model" "m"}',
        b"{model:1}",
        b'{"a":"\\ud800","model":"m"}',
        b'{"a":"\\udc00","model":"m"}',
        b'{"a":"\\ud800\\n","model":"m"}',
        b'{"a":"\\x","model":"m"}',
        b'{"a":"\\',
        b'{"a":"\\u12',
        b'{"a":01,"model":"m"}',
        b'{"a":1.,"model":"m"}',
        b'{"a":.5,"model":"m"}',
        b'{"a":1e,"model":"m"}',
        b'{"a":-,"model":"m"}',
        b'{"a":nul,"model":"m"}',
        b'{"a":[1,],"model":"m"}',
        b'{"a":[1 2],"model":"m"}',
        b'{"a":{"b"},"model":"m"}',
        b'{"a":[}],"model":"m"}',
        b'{"a":' + b"[" * 100 + b"]" * 100 + b',"model":"m"}',
        b'{"a":' + b'{"a":' * 100_000,
    ],
)
def test_what_is_not_plain_is_left_to_the_other_reader(compiled: ModuleType, body: bytes) -> None:
    assert compiled.peek(body, 0) is None


def test_of_a_member_that_comes_twice_the_last_one_counts(compiled: ModuleType) -> None:
    quick = agree(compiled, b'{"model":"a","messages":[1],"messages":[2]}')
    assert quick is not None
    assert quick.messages == b"[2]"
    assert compiled.peek(b'{"model":"a","model":"b"}', 0) is None
    assert peek(b'{"model":"a","model":"b"}').model == "b"


def test_what_is_large_is_not_copied(compiled: ModuleType) -> None:
    messages = b'[{"role":"user","content":"' + b"word " * 2000 + b'"}]'
    body = b'{"messages":' + messages + b',"model":"m"}'
    quick = agree(compiled, body, before=b"POST /")
    assert quick is not None
    assert isinstance(quick.messages, memoryview)
    assert quick.messages == messages


@pytest.mark.parametrize(
    "arguments", [(), (b"{}",), ("{}", 0), (b"{}", 3), (b"{}", -1), (b"{}", "0"), (bytearray(), 0)]
)
def test_wrong_calls_are_refused(compiled: ModuleType, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        compiled.peek(*arguments)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(
    "body",
    [
        b'{"model" : "m:awq" , "messages":[{"model":"x"}]}',
        b'{"messages":["\\"model\\":\\"x\\""],"model":"m:awq"}',
        b'{"mod\\u0065l":"m:awq"}',
    ],
)
def test_only_the_models_name_is_changed(body: bytes, start: int) -> None:
    data = b"head "[:start] + body
    renamed = rename(peek(data, start), data, start, 'm"ü')
    assert renamed == body.replace(b'"m:awq"', '"m\\"ü"'.encode())


def test_a_fault_is_named() -> None:
    with pytest.raises(RequestError, match="not valid JSON"):
        peek(b'{"model":"m",}')
    with pytest.raises(RequestError, match=r"\$\.model"):
        peek(b'{"model":1}')
