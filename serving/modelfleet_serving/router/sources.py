"""Where the route table comes from: a file that is reread, or the registry's long poll."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import yaml

from modelfleet_serving.contract import RouteTable, TableUpdate
from modelfleet_serving.router.table import TableError, check_models

_log = logging.getLogger(__name__)

Apply = Callable[[TableUpdate], Awaitable[None]]
POLL_SECONDS: Final = 0.25
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_table(path: Path) -> RouteTable:
    """Reads and checks a route table.

    Raises:
        TableError: with the file, the place in it and what is wrong there.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            table = msgspec.convert(yaml.load(text, Loader=_LOADER) or {}, RouteTable)  # noqa: S506 - a safe loader
        else:
            table = msgspec.json.decode(text, type=RouteTable)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise TableError(f"{path}: {error}") from error
    faults = check_models(table.models)
    if faults:
        raise TableError(f"{path}: " + "; ".join(faults))
    return table


class FileSource:
    """Watches a route table file. A bad file changes nothing: the last good table stays."""

    def __init__(self, path: Path, apply: Apply) -> None:
        self._path = path
        self._apply = apply
        self._seen: tuple[int, int, int] | None = None
        self._version = 0

    async def start(self) -> None:
        """Reads the file for the first time.

        Raises:
            TableError: when there is no table to start with.
        """
        self._seen = self._stamp()
        await self._load()

    async def run(self) -> None:
        """Rereads the file whenever it changes."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            stamp = self._stamp()
            if stamp == self._seen:
                continue
            self._seen = stamp
            try:
                await self._load()
            except TableError as error:
                _log.error("the route table stays as it was: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    async def _load(self) -> None:
        table = await asyncio.to_thread(load_table, self._path)
        self._version += 1
        await self._apply(TableUpdate(epoch="file", version=self._version, full=True, models=table.models))
        endpoints = sum(len(variant.endpoints) for model in table.models for variant in model.variants)
        _log.info("route table %d: %d models, %d endpoints", self._version, len(table.models), endpoints)
