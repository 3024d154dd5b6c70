"""Engine environments: an interpreter per engine, since engines and Ray can't share one."""

from modelfleet_serving.environments.errors import (
    EngineNotInstalledError,
    EnvironmentsError,
    InstallError,
    UnknownEngineError,
    UnsupportedPlatformError,
)
from modelfleet_serving.environments.installer import install
from modelfleet_serving.environments.layout import EngineEnvironment, cache_root, resolve

__all__ = [
    "EngineEnvironment",
    "EngineNotInstalledError",
    "EnvironmentsError",
    "InstallError",
    "UnknownEngineError",
    "UnsupportedPlatformError",
    "cache_root",
    "install",
    "resolve",
]
