"""Reading numbers out of a ``config.json`` whose field names differ between model families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]

TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Where multimodal configs keep the language model's part."""


LARGEST = 2**40
"""Beyond every number in a config.json: what is larger was never meant."""


class BrokenConfigError(ValueError):
    """The config lacks something that the arithmetic needs, or contradicts itself."""


def text_config(config: Config) -> Config:
    """The language model's part: a section of a multimodal config, or the whole."""
    for name in TEXT_SECTIONS:
        section = config.get(name)
        if isinstance(section, Mapping) and section:
            return text_config(section)
    return config


def integer(config: Config, *names: str, default: int | None = None) -> int:
    """The first of these fields that holds a number.

    Raises:
        BrokenConfigError: none does and there is no default, or it is not a whole number.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        # Infinity and NaN are numbers to Python's JSON, and unequal to every whole one within the bounds.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise BrokenConfigError(f"{name} must be a whole number, is {_shown(value)}")
        if value != int(value):
            raise BrokenConfigError(f"{name} must be a whole number, is {value!r}")
        return int(value)
    if default is None:
        raise BrokenConfigError(f"config.json has no {names[0]}")
    return default


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def positive(config: Config, *names: str, default: int | None = None) -> int:
    """Like :func:`integer`, and above 0."""
    value = integer(config, *names, default=default)
    if value < 1:
        raise BrokenConfigError(f"{names[0]} must be positive, is {value}")
    return value


def optional(config: Config, *names: str) -> int | None:
    """Like :func:`integer`, or ``None`` where the config says nothing or null."""
    if all(config.get(name) is None for name in names):
        return None
    return integer(config, *names)


def section(config: Config, *names: str) -> Config | None:
    """The first of these sections that is there."""
    for name in names:
        value = config.get(name)
        if isinstance(value, Mapping) and value:
            return value
    return None


def words(value: object) -> tuple[str, ...]:
    """A list of strings, or nothing."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(str(item) for item in value)
    return ()
