"""Numbers in heads and usage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfleet_serving.router.admission import output_limit
from modelfleet_serving.router.digits import MAX_DIGITS, read_digits
from modelfleet_serving.router.peek import peek
from modelfleet_serving.router.usage import read_usage


@given(st.binary(max_size=40), st.integers(0, 10**MAX_DIGITS - 1), st.binary(max_size=40))
def test_reads_what_was_written(before: bytes, number: int, after: bytes) -> None:
    digits = b"%d" % number
    value, end = read_digits(before + digits + b"x" + after, len(before))
    assert (value, end) == (number, len(before) + len(digits))


@given(st.binary(max_size=40), st.integers(0, 50))
def test_reads_no_further_than_the_digits_and_the_data_go(data: bytes, start: int) -> None:
    value, end = read_digits(data, start)
    digits = data[start:end]
    assert end == start or digits.isdigit()
    assert value == int(digits or b"0")
    assert len(digits) <= MAX_DIGITS
    assert len(digits) == MAX_DIGITS or not data[end : end + 1].isdigit()


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        (b'"usage":{"prompt_tokens":12,"completion_tokens":7}', (12, 7)),
        (b'"usage":{"prompt_tokens":12,"total_tokens":19,"completion_tokens":7}', (12, 7)),
        (b'"usage":{"prompt_tokens":12,"total_tokens":19,"completion_tokens":7,"x":{"y":1}}', (12, 7)),
        (b'"usage": {"prompt_tokens": 12, "completion_tokens": 7}', (12, 7)),
        (b'"usage":{"prompt_tokens":12,"prompt_tokens_details":null,"completion_tokens":7}', (12, 7)),
        (b'"usage":{"completion_tokens":7,"prompt_tokens":12}', (12, 7)),
        (b'"usage":{"input_tokens":12,"output_tokens":7}', (12, 7)),
        (b'"usage":{"prompt_tokens":12}', (12, 0)),
        (b'"usage":{"prompt_tokens":12,"completion_tokens":null}', (12, 0)),
        (b'"usage":{"prompt_tokens":,"completion_tokens":7}', (0, 7)),
        (b'"usage":null', None),
        (b'"usage":{"prompt_tokens":12,"completion_tokens":7', (12, 7)),
        (b'"usage":{"prompt_tokens":12,"completion_tok', (12, 0)),
    ],
)
def test_reads_usage_however_it_is_written(event: bytes, tokens: tuple[int, int] | None) -> None:
    assert read_usage(b'{"choices":[],' + event) == tokens


@pytest.mark.parametrize(
    ("members", "tokens"),
    [
        ("", 0),
        (',"max_tokens":7', 7),
        (',"max_completion_tokens":7', 7),
        (',"max_tokens":9,"max_completion_tokens":7', 7),
        (',"max_tokens":9,"max_completion_tokens":null', 9),
        (',"max_tokens":0', 0),
        (',"max_tokens":-5', 0),
        (',"max_tokens":1.5', 0),
        (',"max_tokens":1e3', 0),
        (',"max_tokens":"7"', 0),
        (f',"max_tokens":{10**30}', 10**14),
    ],
)
def test_reads_how_much_a_body_asks_for(members: str, tokens: int) -> None:
    assert output_limit(peek(f'{{"model":"m"{members}}}'.encode())) == tokens
