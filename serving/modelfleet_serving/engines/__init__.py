"""Engines by name. Adding one is a file in this package and a line here."""

from __future__ import annotations

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

__all__ = [
    "Call",
    "Drain",
    "EngineAdapter",
    "EngineSettingsError",
    "Launch",
    "Platform",
    "Probe",
    "SettingsProblem",
    "Sleep",
]
