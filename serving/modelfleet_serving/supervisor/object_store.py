"""A folder of an object store, copied to this node. Its address and credentials stand in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

PART_BYTES: Final = 64 * 2**20
"""One request: small enough for a time-out that tells a stalled connection from a slow one."""
PARTS_AT_ONCE: Final = 8
"""One connection doesn't fill a node's network; memory for so many parts is little beside any model."""
PART_TIMEOUT: Final = timedelta(seconds=120)
CONNECT_TIMEOUT: Final = timedelta(seconds=10)


@dataclass(frozen=True)
class _Part:
    """A range of a file."""

    path: str
    begin: int
    end: int


def download(source: str, target: Path) -> None:
    """Copy every file below a source into a folder, which is made.

    Args:
        source: ``s3://bucket/path`` or ``gs://bucket/path``.
        target: the folder.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the disk doesn't take it.
        obstore.exceptions.BaseError: the store refuses or can't be reached, after retries.
    """
    from obstore.store import from_url  # noqa: PLC0415  only replicas with such a source need it

    # Whoever names an http:// endpoint means it; without one it is https.
    options: Any = {"allow_http": True, "timeout": PART_TIMEOUT, "connect_timeout": CONNECT_TIMEOUT}
    store = from_url(source, client_options=options)
    files = {str(file["path"]): int(file["size"]) for batch in store.list() for file in batch}
    if not files:
        raise FileNotFoundError(source)
    for path, size in files.items():
        file = _below(target, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as created:
            created.truncate(size)
    with ThreadPoolExecutor(PARTS_AT_ONCE, "download") as pool:
        try:
            for _ in pool.map(lambda part: _fetch(store, part, target), _parts(files)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # what is left of a failed copy isn't waited for


def _below(target: Path, path: str) -> Path:
    file = target / path
    if ".." in file.parts:
        raise FileNotFoundError(f"{path} would lie outside of its folder")
    return file


def _parts(files: dict[str, int]) -> Iterator[_Part]:
    for path, size in files.items():
        for begin in range(0, size, PART_BYTES):
            yield _Part(path, begin, min(begin + PART_BYTES, size))


def _fetch(store: Any, part: _Part, target: Path) -> None:
    data = store.get_range(part.path, start=part.begin, end=part.end)
    with (target / part.path).open("r+b") as file:
        written = os.pwrite(file.fileno(), data, part.begin)
    if written != part.end - part.begin:
        raise OSError(f"{part.path}: {written} bytes instead of {part.end - part.begin} at {part.begin}")
