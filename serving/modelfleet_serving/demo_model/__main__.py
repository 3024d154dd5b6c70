"""``python -m modelfleet_serving.demo_model``: make the demo model and print where it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from modelfleet_serving.demo_model.maker import DemoModelError, build
from modelfleet_serving.environments import EnvironmentsError


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def command(
    out: Annotated[
        Path | None, typer.Option(help="Directory for both checkpoints; default: the cache.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Make SmolLM2-135M-Instruct as a bf16 and an int8 (W8A8) checkpoint."""
    try:
        model = build(out, say=_progress)
    except (DemoModelError, EnvironmentsError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    paths = {"bf16": str(model.bf16), "w8a8": str(model.w8a8)}
    print(json.dumps(paths) if as_json else "\n".join(paths.values()))


if __name__ == "__main__":
    typer.run(command)
