"""Where weights are, and what an engine is given for them.

================================  ==============================================================
``hf://ORG/NAME[@REVISION]``      the model id; the engine downloads it itself
``file:///PATH``                  the directory
``pvc://CLAIM/PATH``              ``$MODELFLEET_PVC_ROOT/CLAIM/PATH``, where the pod mounts the claim
``oci://IMAGE``                   ``$MODELFLEET_OCI_ROOT/IMAGE``, where the pod mounts the image
``s3://…``, ``gs://…``            a copy in the node's cache, made once for all replicas of the node
================================  ==============================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import filelock
import platformdirs

from modelfleet_serving.supervisor import object_store

PVC_ROOT: Final = "/mnt/models"
OCI_ROOT: Final = "/mnt/images"
_DONE: Final = ".modelfleet-complete"
_LOCK_SECONDS: Final = 3600.0


class ModelNotFoundError(Exception):
    """There are no weights where the source says."""


class ModelFetchError(Exception):
    """The weights are there but couldn't be copied; another try may succeed."""


@dataclass(frozen=True)
class Model:
    """What the engine is given."""

    name: str
    """A directory, or a model id."""
    is_local: bool
    revision: str | None = None


def locate(source: str, environ: Mapping[str, str] = os.environ) -> Model:
    """The weights of a source; blocks while they are copied.

    Raises:
        ModelNotFoundError: nothing is there, or the source isn't understood.
        ModelFetchError: the copy failed.
    """
    scheme, separator, rest = source.partition("://")
    if not separator or not rest:
        raise ModelNotFoundError(f"{source!r} is no source of a model: SCHEME://PLACE is expected")
    match scheme:
        case "hf":
            name, _, revision = rest.partition("@")
            return Model(name, is_local=False, revision=revision or None)
        case "file":
            return _directory(source, Path("/" + rest.lstrip("/")))
        case "pvc":
            return _directory(source, _below(source, environ.get("MODELFLEET_PVC_ROOT", PVC_ROOT), rest))
        case "oci":
            return _directory(source, _below(source, environ.get("MODELFLEET_OCI_ROOT", OCI_ROOT), rest))
        case "s3" | "gs":
            return Model(str(_copy(source, _cache(environ))), is_local=True)
    raise ModelNotFoundError(f"{source}: {scheme}:// is not one of hf, file, pvc, oci, s3, gs")


def adapter_directory(source: str, environ: Mapping[str, str] = os.environ) -> str:
    """The directory of a LoRA adapter; one from a hub is downloaded, for engines take a path alone.

    Raises:
        ModelNotFoundError: nothing is there.
        ModelFetchError: the copy failed.
    """
    found = locate(source, environ)
    if found.is_local:
        return found.name
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415  few replicas have adapters of a hub
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415
    except ImportError as error:
        raise ModelFetchError(f"{source}: huggingface-hub is not installed here") from error
    try:
        return str(snapshot_download(found.name, revision=found.revision))
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"{source}: {error}") from error
    except OSError as error:
        raise ModelFetchError(f"{source}: {error}") from error


def _below(source: str, root: str, rest: str) -> Path:
    path = Path(root, rest)
    if ".." in path.parts:
        raise ModelNotFoundError(f"{source}: '..' may not stand in a source")
    return path


def _directory(source: str, path: Path) -> Model:
    # A GGUF model is one file.
    if not path.exists():
        raise ModelNotFoundError(f"{source}: there is no {path} on this node")
    return Model(str(path), is_local=True)


def _cache(environ: Mapping[str, str]) -> Path:
    root = environ.get("MODELFLEET_CACHE")
    return (Path(root) if root else platformdirs.user_cache_path("modelfleet")) / "models"


def _copy(source: str, cache: Path) -> Path:
    """Copy a folder of an object store once; replicas that come meanwhile wait."""
    target = cache / hashlib.sha256(source.encode()).hexdigest()[:24]
    if (target / _DONE).exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(cache / f"{target.name}.lock", timeout=_LOCK_SECONDS):
            if not (target / _DONE).exists():
                _download(source, target)
    except filelock.Timeout as error:
        raise ModelFetchError(f"{source}: another replica has been copying it for an hour") from error
    return target


def _download(source: str, target: Path) -> None:
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        object_store.download(source, partial)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{source}: nothing is there") from error
    except Exception as error:  # the store's, the disk's
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)
        first = str(error).partition("\n")[0]  # the store's client adds its inner state
        raise ModelFetchError(f"{source}: {type(error).__name__}: {first}") from error
    (partial / _DONE).touch()
    partial.rename(target)
