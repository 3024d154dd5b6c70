"""Command lines of the package installer: uv where there is one, pip otherwise."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_FORWARDED: Final = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "no-index": "UV_NO_INDEX",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}


def find_uv() -> str | None:
    """The uv executable: of the package beside us, or on the path."""
    try:
        from uv import find_uv_bin  # noqa: PLC0415 - optional
    except ImportError:
        return shutil.which("uv")
    try:
        return str(find_uv_bin())
    except FileNotFoundError:
        return shutil.which("uv")


def pip_settings() -> dict[str, str]:
    """Pip's options from its files and environment, by name; empty without pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return parse_pip_config(said.stdout) if said.returncode == 0 else {}


def parse_pip_config(text: str) -> dict[str, str]:
    """``pip config list``: environment over ``install`` over ``global``, as pip itself ranks them."""
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        section, dot, option = key.rpartition(".")
        if not separator or not dot or section not in ranks:
            continue
        rank = ranks[section]
        if option not in found or rank >= found[option][0]:
            found[option] = (rank, str(ast.literal_eval(value)))
    return {option: value for option, (_, value) in found.items()}


def uv_environment(settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv, which reads none of pip's configuration: what uv has of its own stays.

    Values go by environment and never by argument: an index URL may hold a password.
    """
    result = dict(environ)
    for option, variable in _FORWARDED.items():
        value = settings.get(option, "")
        if option == "find-links":
            value = ",".join(link for link in value.split() if "://" in link or Path(link).is_dir())
        elif option == "extra-index-url":
            value = " ".join(value.split())
        if value and variable not in result:
            result[variable] = value
    if "UV_INDEX" in result and "UV_INDEX" not in environ:
        # pip takes the best version of all indexes; uv would take all from the first that has the name.
        result.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return result


def requirement_name(line: str) -> str:
    """The normalized name in a requirement, or '' for a comment or an empty line."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip())
    return re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""


def without_cuda(lines: Iterable[str], cpu_wheels: Iterable[str], cuda_only: tuple[str, ...]) -> list[str]:
    """A lock with the builds that need no CUDA in place of the ones that do, and without CUDA's libraries."""
    replacements = {requirement_name(wheel): wheel for wheel in cpu_wheels}
    kept = []
    for line in lines:
        name = requirement_name(line)
        if name and not name.startswith(cuda_only):
            kept.append(replacements.get(name, line))
    return kept
