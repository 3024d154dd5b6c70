"""Decimal numbers in bytes, read and written in place: heads and usage have some in every message."""

from __future__ import annotations

from typing import Final

_ZERO: Final = 0x30
_NINE: Final = 0x39
MAX_DIGITS: Final = 15
"""What is longer is no length or count, and doesn't fit every reader's integers."""


def read_digits(data: bytes, start: int) -> tuple[int, int]:
    """The number that stands at ``start``, and where it ends: at ``start`` when there is none.

    At most :data:`MAX_DIGITS` digits are read.
    """
    value = 0
    place = start
    stop = min(len(data), start + MAX_DIGITS)
    while place < stop:
        digit = data[place]
        if digit < _ZERO or digit > _NINE:
            break
        value = value * 10 + digit - _ZERO
        place += 1
    return value, place


def write_digits(number: int) -> bytes:
    """A number's digits; quicker than formatting bytes."""
    return str(number).encode()
