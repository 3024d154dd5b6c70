"""Resources from files: the store of `modelfleet up`. Edits are live; a broken one changes nothing."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from watchfiles import awatch

from modelfleet_operator.api import (
    InvalidResourcesError,
    ModelDeployment,
    Problem,
    Resource,
    ServingPool,
    parse_resources,
)

STDIN: Final = Path("-")
"""Stands for standard input, which can be read once and not followed."""
_STDIN_NAME: Final = "stdin"
_SUFFIXES: Final = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Resources:
    """Everything that the files hold."""

    deployments: dict[str, ModelDeployment] = field(default_factory=dict)
    pools: dict[str, ServingPool] = field(default_factory=dict)


def load(paths: Sequence[Path]) -> Resources:
    """Resources of files, of all YAML and JSON files in directories, and of standard input for ``-``.

    Raises:
        InvalidResourcesError: with every problem of every file.
    """
    problems: list[Problem] = []
    found: list[tuple[str, Resource]] = []
    for path in _files(paths, problems):
        name = _STDIN_NAME if path == STDIN else str(path)
        try:
            found += [(name, r) for r in parse_resources(_read(path), name)]
        except InvalidResourcesError as error:
            problems += error.problems
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(name, "", f"can't be read: {error}"))
    problems += _clashes(found)
    if problems:
        raise InvalidResourcesError(problems)
    return Resources(
        {r.key: r for _, r in found if isinstance(r, ModelDeployment)},
        {r.key: r for _, r in found if isinstance(r, ServingPool)},
    )


def _read(path: Path) -> str:
    return (sys.stdin.buffer.read() if path == STDIN else path.read_bytes()).decode()


def _files(paths: Sequence[Path], problems: list[Problem]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path == STDIN:
            if STDIN in files:
                problems.append(Problem(_STDIN_NAME, "", "can be read only once: give - once"))
            else:
                files.append(path)
        elif path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
        elif path.exists():
            files.append(path)
        else:
            problems.append(Problem(str(path), "", "no such file or directory"))
    return files


def _clashes(found: Sequence[tuple[str, Resource]]) -> list[Problem]:
    """Names that two resources of the files claim."""
    problems = []
    owners: dict[tuple[str, str], str] = {}
    for file, resource in found:
        owner = f"{resource.kind} {resource.key}"
        claims: list[tuple[str, str]] = [(resource.kind, resource.key)]
        if isinstance(resource, ModelDeployment):
            adapters = [a.name for a in resource.spec.adapters]
            claims += [("model name", name) for name in (resource.model_name, *adapters)]
        for what, name in claims:
            if (what, name) in owners:
                other = owners[what, name]
                problems.append(Problem(file, owner, f"{what} {name} is already taken by {other}"))
            owners.setdefault((what, name), owner)
    return problems


async def watch(paths: Sequence[Path]) -> AsyncIterator[Resources | InvalidResourcesError]:
    """What the files hold after each change, or what is wrong with it."""
    # Editors replace files; the folders see that, the files' own watches would be lost.
    folders = {path if path.is_dir() else path.absolute().parent for path in paths}
    watched = {path.absolute() for path in paths}

    def ours(_change: object, name: str) -> bool:
        changed = Path(name)
        return changed in watched or (changed.parent in watched and changed.suffix in _SUFFIXES)

    async for _ in awatch(*folders, watch_filter=ours, debounce=200, recursive=False):
        try:
            yield load(paths)
        except InvalidResourcesError as error:
            yield error
