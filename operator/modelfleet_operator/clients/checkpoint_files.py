"""Small reads from a checkpoint, wherever it lies: a whole JSON file, or the header of a safetensors file."""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from modelfleet_operator.clients.tensor_bytes import MAX_HEADER_BYTES
from modelfleet_operator.planner.fields import BrokenConfigError

LENGTH_BYTES: Final = 8


class CheckpointError(Exception):
    """A checkpoint that can't be read.

    Attributes:
        reason: one CamelCase word.
        retryable: may pass by itself.
    """

    def __init__(self, reason: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.retryable = retryable


class CheckpointFiles(ABC):
    """One checkpoint's files."""

    @abstractmethod
    def names(self) -> list[str]:
        """All files at the checkpoint's top."""

    @abstractmethod
    def read_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes of a file, fewer at its end; ``None`` where there is no such file."""

    @abstractmethod
    def describe(self) -> str:
        """The source for messages."""

    def revision(self) -> str | None:
        """Commit, where the source has such a thing."""
        return None

    def cache_key(self) -> str | None:
        """Names what the files hold for ever; ``None`` where they may change unseen."""
        return None

    def read_optional(self, name: str, limit: int) -> bytes | None:
        """A whole small file; ``None`` where there is none."""
        data = self.read_range(name, 0, limit + 1)
        if data is not None and len(data) > limit:
            raise CheckpointError("BrokenConfig", f"{self.describe()}: {name} is larger than {limit} bytes")
        return data

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file that must be there."""
        data = self.read_optional(name, limit)
        if data is None:
            raise CheckpointError("NotFound", f"{self.describe()} has no {name}")
        return data

    def header(self, name: str) -> bytes:
        """Header of a safetensors file: an 8-byte length and so much JSON."""
        start = self.read_range(name, 0, LENGTH_BYTES)
        if start is None:
            raise CheckpointError("NotFound", f"{self.describe()} has no {name}, which its index names")
        if len(start) < LENGTH_BYTES:
            raise BrokenConfigError(f"{name} is too short for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise BrokenConfigError(f"{name} is no safetensors file: its header would have {length} bytes")
        return self.read_range(name, LENGTH_BYTES, LENGTH_BYTES + length) or b""


class LocalFiles(CheckpointFiles):
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise CheckpointError("NotFound", f"{directory} is no directory", retryable=True)

    def describe(self) -> str:
        """The source."""
        return str(self.directory)

    def names(self) -> list[str]:
        """The checkpoint's files."""
        return sorted(path.name for path in self.directory.iterdir() if path.is_file())

    def read_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes of one file."""
        try:
            with (self.directory / name).open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(
                "Unreadable", f"{self.directory / name}: {error.strerror}", retryable=True
            ) from error


class ObjectStoreFiles(CheckpointFiles):
    """A folder of an object store; its address and credentials stand in the environment.

    Args:
        source: ``s3://bucket/path`` or ``gs://bucket/path``.
        timeout: seconds for one request and its retries.
    """

    def __init__(self, source: str, timeout: float) -> None:
        self.source = source.rstrip("/")
        self.timeout = timedelta(seconds=timeout)

    @cached_property
    def _store(self) -> Any:
        from obstore.store import from_url  # noqa: PLC0415  (only where there is such a source)

        with _store_errors(self.source):
            return from_url(
                self.source,
                # Whoever names an http:// endpoint means it; without one it is https.
                client_options={
                    "allow_http": True,
                    "timeout": self.timeout,
                    "connect_timeout": self.timeout,
                },
                retry_config={"retry_timeout": self.timeout},
            )

    def describe(self) -> str:
        """The source."""
        return self.source

    def names(self) -> list[str]:
        """The checkpoint's files."""
        with _store_errors(self.source):
            return sorted(str(file["path"]) for file in self._store.list_with_delimiter()["objects"])

    def read_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes of one file."""
        try:
            with _store_errors(self.source):
                return bytes(self._store.get_range(name, start=begin, end=end))
        except FileNotFoundError:
            return None


@contextmanager
def _store_errors(source: str) -> Iterator[None]:
    """Turns a store's errors into reasons."""
    from obstore import exceptions  # noqa: PLC0415

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise CheckpointError("Unauthorized", f"{source}: access denied") from error
    except exceptions.BaseError as error:
        first = str(error).partition("\n")[0]  # its inner state follows
        raise CheckpointError("Unreachable", f"{source}: {first}", retryable=True) from error


class HubFiles(CheckpointFiles):
    """A repository of the Hugging Face hub; what is in its local cache is read from there."""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        token: str | None,
        timeout: float,
        config: str = "config.json",
    ) -> None:
        self.repository = repository
        self.config = config
        self.asked_revision = revision
        self.token = token
        self.timeout = timeout
        if repository.count("/") != 1:
            raise CheckpointError("NotFound", f"hf://{repository} is not of the form hf://organisation/name")

    def describe(self) -> str:
        """The source."""
        return f"hf://{self.repository}" + (f"@{self.asked_revision}" if self.asked_revision else "")

    @cached_property
    def _local(self) -> LocalFiles | None:
        """The snapshot in the hub's local cache, if its config is there."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

        found = try_to_load_from_cache(self.repository, self.config, revision=self.asked_revision)
        return LocalFiles(Path(found).parent) if isinstance(found, str) else None

    @cached_property
    def _info(self) -> tuple[str, list[str]]:
        """Commit and files."""
        from huggingface_hub import HfApi  # noqa: PLC0415

        with _hub_errors(self.describe()):
            info = HfApi(token=self.token).model_info(
                self.repository, revision=self.asked_revision, timeout=self.timeout
            )
        return str(info.sha), [str(sibling.rfilename) for sibling in info.siblings or []]

    @cached_property
    def _offline(self) -> LocalFiles | None:
        """The local copy where the hub must not or can't be asked."""
        try:
            _ = self._info
        except CheckpointError as error:
            if error.reason in {"Unreachable", "Offline"} and self._local is not None:
                return self._local
            raise
        return None

    def revision(self) -> str | None:
        """Commit of the repository."""
        local = self._offline
        return local.directory.name if local else self._info[0]

    def cache_key(self) -> str | None:
        """Names the commit."""
        return hashlib.sha256(f"{self.repository}@{self.revision()}".encode()).hexdigest()[:32]

    def names(self) -> list[str]:
        """The checkpoint's files."""
        local = self._offline
        return local.names() if local else [name for name in self._info[1] if "/" not in name]

    def read_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes of one file."""
        local = self._offline
        if local is not None:
            return local.read_range(name, begin, end)
        if name not in self._info[1]:
            return None
        from huggingface_hub import get_session, hf_hub_url  # noqa: PLC0415
        from huggingface_hub.utils._headers import build_hf_headers  # noqa: PLC0415
        from huggingface_hub.utils._http import hf_raise_for_status  # noqa: PLC0415

        url = hf_hub_url(self.repository, name, revision=self._info[0])
        headers = build_hf_headers(token=self.token) | {"Range": f"bytes={begin}-{end - 1}"}
        with _hub_errors(self.describe()):
            response = get_session().get(url, headers=headers, timeout=self.timeout, follow_redirects=True)
            if response.status_code == 416:  # the file ends before the range
                return b""
            hf_raise_for_status(response)
        return bytes(response.content)[: end - begin]


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turns the hub's errors into reasons."""
    try:
        yield
    except Exception as error:  # the hub's client raises its own, requests' and the system's
        raise hub_problem(source, error) from error


def hub_problem(source: str, error: Exception) -> CheckpointError:
    """The one reason of a hub's error."""
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            "Gated", f"{source} is gated: accept its licence and give the pool a token (HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError("NotFound", f"{source}: the hub has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            "NotFound", f"{source}: the hub has no such model, or it is private and the token may not see it"
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointError("NotFound", f"{source} is no valid model name")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(
            "Offline", f"{source} is not in the local cache, and offline mode is on", retryable=True
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in {401, 403}:
        return CheckpointError("Unauthorized", f"{source}: the hub refuses the token (HTTP {status})")
    if isinstance(status, int):
        return CheckpointError("Unreachable", f"{source}: the hub answers HTTP {status}", retryable=True)
    return CheckpointError(
        "Unreachable", f"{source}: the hub can't be reached ({type(error).__name__})", retryable=True
    )
