"""Where environments are, which ones are whole, and which one an engine start uses."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from modelfleet_serving.engines.base import Platform
from modelfleet_serving.environments.catalog import RECIPES, engine_key
from modelfleet_serving.environments.errors import EngineNotInstalledError

MARKER: Final = "modelfleet-engine.json"
"""Written last into an environment: one without it is half made and never used."""

_PROBE: Final = """
import importlib.metadata as m, json, sys
for name in sys.argv[1:]:
    try:
        print(json.dumps([name, m.version(name)])); break
    except m.PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class EngineEnvironment:
    """An interpreter that has an engine."""

    python: Path
    version: str
    platform: Platform


@functools.cache
def detect_platform() -> Platform:
    """CUDA where the NVIDIA driver lists a GPU, CPU otherwise."""
    if shutil.which("nvidia-smi") is None:
        return Platform.CPU
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Platform.CPU
    return Platform.CUDA if listed.returncode == 0 and "GPU " in listed.stdout else Platform.CPU


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """``$MODELFLEET_CACHE``, or the user's cache directory."""
    configured = environ.get("MODELFLEET_CACHE")
    return (
        Path(configured).expanduser().absolute() if configured else platformdirs.user_cache_path("modelfleet")
    )


def directory(engine: str, version: str, platform: Platform) -> Path:
    """Where the environment of an engine version is, made or not."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return cache_root() / "engines" / f"{engine}-{version}-{platform.value}-{python}"


def read_environment(path: Path) -> EngineEnvironment | None:
    """The environment in a directory, or None when it is missing or half made."""
    try:
        marker = json.loads((path / MARKER).read_text())
        found = EngineEnvironment(
            path / "bin" / "python", str(marker["version"]), Platform(marker["platform"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The interpreter is a link: it dangles after the Python that it came from is removed.
    return found if found.python.exists() else None


def installed() -> list[tuple[str, Path, EngineEnvironment]]:
    """Engine, directory and environment of everything that is whole, by name."""
    return [
        (path.name.split("-", 1)[0], path, environment)
        for path in sorted((cache_root() / "engines").glob("*-*"))
        if (environment := read_environment(path)) is not None
    ]


def resolve(engine: str, version: str | None = None) -> EngineEnvironment:
    """The environment that starts an engine on this machine.

    ``MODELFLEET_<ENGINE>_PYTHON`` wins (container images set it); then what ``install`` made: the version
    asked for, or else the default one.

    Raises:
        UnknownEngineError: No such engine.
        EngineNotInstalledError: Nothing fits; its ``command`` makes what is missing.
    """
    key = engine_key(engine)
    variable = f"MODELFLEET_{key.upper()}_PYTHON"
    if configured := os.environ.get(variable):
        return _given(key, version, variable, Path(configured))
    platform = detect_platform()
    recipe = RECIPES[key].get(platform)
    wanted = version or (recipe.default_version if recipe else None)
    found = read_environment(directory(key, wanted, platform)) if wanted else None
    if found is None:
        raise EngineNotInstalledError(key, version)
    return found


def _given(engine: str, version: str | None, variable: str, python: Path) -> EngineEnvironment:
    try:
        name, found = _distribution(python, engine)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise EngineNotInstalledError(
            engine, version, f"{variable}={python} has no usable {engine}"
        ) from error
    if version is not None and found.split("+", 1)[0] != version:
        reason = f"{variable}={python} has {engine} {found}, and {version} is asked for"
        raise EngineNotInstalledError(engine, version, reason)
    on_cpu = name.endswith("-cpu") or found.endswith("+cpu")
    return EngineEnvironment(python, found, Platform.CPU if on_cpu else Platform.CUDA)


@functools.cache
def _distribution(python: Path, engine: str) -> tuple[str, str]:
    """Name and version of the engine's distribution there, without importing the engine (seconds)."""
    command = [str(python), "-c", _PROBE, engine, f"{engine}-cpu"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    name, version = json.loads(said)
    return str(name), str(version)
