"""Reads the documents that hold API keys: a file, or a directory such as a mounted Secret."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_MAX_BYTES: Final = 16 * 1024 * 1024


def read_key_documents(path: Path) -> dict[str, bytes]:
    """Contents by file name. A change of what this returns is a change of the keys.

    Names that begin with a dot are left out: a mounted Secret has its versions there.

    Raises:
        OSError: It can't be read, or is larger than 16 MiB.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and file.is_file()]
    documents: dict[str, bytes] = {}
    size = 0
    for file in files:
        content = file.read_bytes()
        size += len(content)
        if size > _MAX_BYTES:
            raise OSError(f"{path}: more than {_MAX_BYTES} bytes")
        documents[file.name] = content
    return documents
