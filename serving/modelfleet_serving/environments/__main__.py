"""``python -m modelfleet_serving.environments``: install, list and find engine environments."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from modelfleet_serving.environments.errors import EnvironmentsError
from modelfleet_serving.environments.installer import install, lock
from modelfleet_serving.environments.layout import installed, resolve

app = typer.Typer(help="Engine environments of this machine.", no_args_is_help=True, add_completion=False)
_Engine = Annotated[str, typer.Argument(help="vllm or sglang.")]
_Version = Annotated[str | None, typer.Option(help="Version; default: the tested one.")]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command("install")
def install_command(
    engine: _Engine,
    version: _Version = None,
    force: Annotated[bool, typer.Option("--force", help="Make it anew.")] = False,
) -> None:
    """Make an environment with an engine for this machine, and print its interpreter."""
    environment = install(engine, version, force=force, say=_progress)
    print(f"{engine} {environment.version} ({environment.platform.value}): {environment.python}")


@app.command("list")
def list_command() -> None:
    """List the engine environments of this machine."""
    for engine, path, environment in installed():
        print(f"{engine}\t{environment.version}\t{environment.platform.value}\t{path}")


@app.command("path")
def path_command(engine: _Engine, version: _Version = None) -> None:
    """Print the interpreter that starts an engine."""
    print(resolve(engine, version).python)


@app.command("lock", hidden=True)
def lock_command(engine: _Engine) -> None:
    """Resolve the exact versions of an engine anew (for developers)."""
    print(lock(engine))


def main() -> int:
    """Run the command line; an error of ours is one message and exit status 1."""
    try:
        app()
    except EnvironmentsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
