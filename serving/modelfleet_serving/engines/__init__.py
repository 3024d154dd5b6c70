"""Engines by name. Adding one is a file in this package and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from modelfleet_serving.engines.base import (
    Call,
    Drain,
    EngineAdapter,
    EngineSettingsError,
    Launch,
    Platform,
    Probe,
    SettingsProblem,
    Sleep,
)
from modelfleet_serving.engines.sglang import SGLang
from modelfleet_serving.engines.simulator import Simulator
from modelfleet_serving.engines.vllm import VLLM

__all__ = [
    "REGISTRY",
    "Call",
    "Drain",
    "EngineAdapter",
    "EngineSettingsError",
    "Launch",
    "Platform",
    "Probe",
    "SettingsProblem",
    "Sleep",
    "UnknownEngineError",
    "get",
]

_ADAPTERS: Final[tuple[EngineAdapter, ...]] = (VLLM(), SGLang(), Simulator())
REGISTRY: Final[Mapping[str, EngineAdapter]] = MappingProxyType({each.name: each for each in _ADAPTERS})
"""Adapters have no state: one of each is enough."""


class UnknownEngineError(ValueError):
    """No adapter has this name."""


def get(name: str) -> EngineAdapter:
    """The adapter of an engine, by the name in ``engine.type``.

    Raises:
        UnknownEngineError: naming the engines that there are.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise UnknownEngineError(f"engine.type: {name!r} is not one of {', '.join(REGISTRY)}") from None
