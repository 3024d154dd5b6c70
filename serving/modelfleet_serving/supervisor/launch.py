"""From an application's arguments to a command line and an environment on this node."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelfleet_serving.contract import ApplicationArgs
from modelfleet_serving.engines import EngineAdapter, EngineSettingsError, Launch, Platform
from modelfleet_serving.environments import (
    EngineEnvironment,
    EngineNotInstalledError,
    UnknownEngineError,
    resolve,
)
from modelfleet_serving.supervisor.sources import (
    ModelFetchError,
    ModelNotFoundError,
    locate,
)

_NOT_INHERITED: Final = frozenset(
    {
        "MODELFLEET_TOKEN",
        # Ray sets it to the CPUs that the replica reserves, often one; engines know better.
        "OMP_NUM_THREADS",
        "VIRTUAL_ENV",
    }
)
_NOT_INHERITED_PREFIXES: Final = ("RAY_",)
"""Ray's token is among them: an engine has no business with the cluster."""


class UnlaunchableError(Exception):
    """The engine can't be started here; ``reason`` is CamelCase and stable."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True)
class Start:
    """Everything that a start needs."""

    command: list[str]
    environment: dict[str, str]
    url: str


def prepare(
    args: ApplicationArgs,
    adapter: EngineAdapter,
    host: str,
    port: int,
    environ: Mapping[str, str] = os.environ,
) -> Start:
    """Look up environment and weights, and render the command line. Blocks while weights are copied.

    Raises:
        UnlaunchableError: something is missing or wrong.
    """
    try:
        engine = _environment(args)
        model = locate(args.source, environ)
        launch = Launch(
            python=str(engine.python),
            model=model.name,
            host=host,
            port=port,
            platform=engine.platform,
            model_is_local=model.is_local,
            model_revision=model.revision,
        )
        command = adapter.command(args, launch)
        own = adapter.environment(args, launch)
    except EngineNotInstalledError as error:
        raise UnlaunchableError("EngineNotInstalled", str(error)) from error
    except ModelNotFoundError as error:
        raise UnlaunchableError("ModelNotFound", str(error)) from error
    except ModelFetchError as error:
        raise UnlaunchableError("ModelFetchFailed", str(error)) from error
    except EngineSettingsError as error:
        raise UnlaunchableError("BadArguments", str(error)) from error
    authority = f"[{host}]" if ":" in host else host
    inherited = inherited_environment(environ, own_interpreter=engine.python == Path(sys.executable))
    return Start(command, {**inherited, **own}, f"http://{authority}:{port}")


def inherited_environment(environ: Mapping[str, str], own_interpreter: bool) -> dict[str, str]:
    """What an engine gets of our environment."""
    kept = {
        name: value
        for name, value in environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }
    if not own_interpreter:  # our packages are not the engine's
        kept.pop("PYTHONPATH", None)
        kept.pop("PYTHONHOME", None)
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def _environment(args: ApplicationArgs) -> EngineEnvironment:
    try:
        return resolve(args.engine.type, args.engine.version)
    except UnknownEngineError:
        # An engine without environments of its own is part of this package.
        return EngineEnvironment(Path(sys.executable), args.engine.version or "", Platform.CPU)
