"""Options and variables of engines that users can't set, because something else does.

The tables are the engine adapters' own (``make generate``): what they would refuse at the start of a replica,
on a node that was bought for it, is refused before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _tables() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    text = files("modelfleet_operator.catalog").joinpath("reserved.json").read_text(encoding="utf-8")
    tables: Mapping[str, Mapping[str, Mapping[str, str]]] = json.loads(text)
    return tables


def reserved_settings(engine: str, args: Mapping[str, Any], env: Mapping[str, str]) -> Iterator[str]:
    """What of the user's options and variables is refused, with what sets it. Values are never named."""
    tables = _tables().get(engine, {})
    options, variables = tables.get("args", {}), tables.get("env", {})
    for name in args:
        option = name.partition(".")[0].replace("_", "-")
        owner = options.get(option) or options.get(option.removeprefix("no-"))
        if owner is not None:
            yield f"engine.args.{name} is set by {owner}"
    for name in env:
        if name in variables:
            yield f"engine.env.{name} is set by {variables[name]}"
