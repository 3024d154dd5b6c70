"""Facts of a model's checkpoint, read without its weights: ``config.json`` and safetensors headers.

Of a LoRA adapter ``adapter_config.json`` is read, in the format of PEFT.

Sources are ``hf://org/name[@revision]``, ``s3://``, ``gs://``, ``file:///path``, and ``pvc://claim/path``
where the claim is mounted. Everything that can go wrong becomes a :class:`ModelUnavailable` with one reason.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

import platformdirs

from modelfleet_operator.clients.checkpoint_files import (
    CheckpointError,
    CheckpointFiles,
    HubFiles,
    LocalFiles,
    ObjectStoreFiles,
)
from modelfleet_operator.clients.tensor_bytes import tensor_bytes
from modelfleet_operator.planner.adapters import AdapterFacts, adapter_source
from modelfleet_operator.planner.config import facts_from_config
from modelfleet_operator.planner.facts import ModelFacts, ModelUnavailable
from modelfleet_operator.planner.fields import BrokenConfigError

log = logging.getLogger(__name__)

_IMPORT: Final = threading.Lock()
_OTHERS: Final = {
    "adapter_config.json": "a LoRA adapter: list it under spec.adapters of its base model",
    "model_index.json": "a diffusion pipeline, which no engine here serves",
    ".gguf": "a set of GGUF files: use the model's safetensors, or an AWQ or GPTQ checkpoint of it",
    "params.json": "in Mistral's own format: use the files that the publisher converted for Transformers",
}
"""What a file without a config.json beside it says, by the end of its name."""
MODEL_CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
MAX_RANK: Final = 65536
"""More is no rank of a matrix."""
PVC_ROOT_VARIABLE: Final = "MODELFLEET_PVC_ROOT"
PVC_ROOT: Final = "/mnt/models"
"""Where pods mount claims, as the replicas look for them."""
READ_TIMEOUT_SECONDS: Final = 60.0
CACHE_VERSION: Final = 1
"""Of the cached files' layout; a change of what is read makes the old ones void."""
MAX_CONFIG_BYTES: Final = 4 * 2**20
UNSEEN_REASONS: Final = frozenset({"SourceNotMounted", "UnsupportedSource"})
"""The engine's node may well reach such a source, though this process can't."""
OBJECT_STORES: Final = ("s3", "gs")


@dataclass
class ModelHub:
    """Reads facts of checkpoints.

    Attributes:
        cache_directory: where facts of fixed revisions are kept; they are never read twice.
        claims_directory: where PersistentVolumeClaims are mounted, one folder each.
        token: of the Hugging Face hub; default its own environment variable or login.
        timeout_seconds: longest time that one source may take.
    """

    cache_directory: Path = field(
        default_factory=lambda: platformdirs.user_cache_path("modelfleet") / "facts"
    )
    claims_directory: Path = field(default_factory=lambda: Path(os.environ.get(PVC_ROOT_VARIABLE, PVC_ROOT)))
    token: str | None = field(default=None, repr=False)
    timeout_seconds: float = READ_TIMEOUT_SECONDS

    async def facts(self, source: str) -> ModelFacts | AdapterFacts | ModelUnavailable:
        """Facts of a model's source or of an adapter's key, or the one reason why there are none."""
        adapter = adapter_source(source)
        try:
            async with asyncio.timeout(self.timeout_seconds):
                if adapter is not None:
                    return await asyncio.to_thread(self.read_adapter, adapter)
                return await asyncio.to_thread(self.read, source)
        except TimeoutError:
            return ModelUnavailable(
                "Unreachable",
                f"{adapter or source} did not answer within {self.timeout_seconds:g} s",
                retryable=True,
            )

    def read(self, source: str) -> ModelFacts | ModelUnavailable:
        """Facts of a model, blocking."""
        try:
            files = self._files(source, MODEL_CONFIG)
            cached = self._cached(files)
            if cached is None:
                cached = _read_checkpoint(files)
                self._keep(files, cached)
            return _facts(source, files, cached)
        except CheckpointError as error:
            unseen = error.reason in UNSEEN_REASONS
            return ModelUnavailable(error.reason, str(error), error.retryable, unseen)
        except BrokenConfigError as error:
            return ModelUnavailable("BrokenConfig", f"{source}: {error}")

    def read_adapter(self, source: str) -> AdapterFacts | ModelUnavailable:
        """Facts of a LoRA adapter, blocking."""
        try:
            data = self._files(source, ADAPTER_CONFIG).read(ADAPTER_CONFIG, MAX_CONFIG_BYTES)
            return AdapterFacts(_rank_of(_parse_config(data, ADAPTER_CONFIG)))
        except CheckpointError as error:
            return ModelUnavailable(error.reason, str(error), error.retryable)
        except BrokenConfigError as error:
            return ModelUnavailable("BrokenConfig", f"{source}: {error}")

    def _files(self, source: str, config: str) -> CheckpointFiles:
        scheme, _, rest = source.partition("://")
        if scheme == "hf":
            repository, _, revision = rest.partition("@")
            return HubFiles(
                repository.strip("/"), revision or None, self.token, self.timeout_seconds / 3, config
            )
        if scheme == "file":
            return LocalFiles(Path(rest))
        if scheme == "pvc":
            claim, _, path = rest.partition("/")
            if ".." in PurePosixPath(rest).parts or not claim:
                raise CheckpointError("InvalidSource", f"{source} is no path inside of a claim")
            directory = self.claims_directory / claim
            if not directory.is_dir():
                raise CheckpointError(
                    "SourceNotMounted",
                    f"{source}: {directory} is not mounted, so its {config} can't be read",
                    retryable=True,
                )
            return LocalFiles(directory / path)
        if scheme in OBJECT_STORES:
            return ObjectStoreFiles(source, self.timeout_seconds / 3)
        raise CheckpointError("UnsupportedSource", f"{source}: facts can't be read from {scheme}:// sources")

    def _cache_file(self, files: CheckpointFiles) -> Path | None:
        key = files.cache_key()
        return self.cache_directory / f"v{CACHE_VERSION}-{key}.json" if key else None

    def _cached(self, files: CheckpointFiles) -> dict[str, Any] | None:
        path = self._cache_file(files)
        if path is None:
            return None
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning(
                "cached facts are unreadable, reading anew", extra={"file": str(path), "error": str(error)}
            )
            return None
        return loaded if isinstance(loaded, dict) else None

    def _keep(self, files: CheckpointFiles, checkpoint: Mapping[str, Any]) -> None:
        path = self._cache_file(files)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(checkpoint), encoding="utf-8")
            draft.replace(path)
        except OSError as error:  # a read-only cache makes planning slower, not wrong
            log.warning("facts can't be cached", extra={"file": str(path), "error": str(error)})


def _read_checkpoint(files: CheckpointFiles) -> dict[str, Any]:
    """Config and tensor bytes as they are cached."""
    try:
        config = _parse_config(files.read(MODEL_CONFIG, MAX_CONFIG_BYTES))
    except CheckpointError as error:
        if error.reason != "NotFound" or not (what := _what_else(files)):
            raise
        raise CheckpointError("NotFound", f"{error}: {what}") from error
    quantization = files.read_optional("hf_quant_config.json", MAX_CONFIG_BYTES)  # ModelOpt writes it apart
    if quantization and "quantization_config" not in config:
        config["quantization_config"] = _parse_config(quantization)
    return {"config": config, "tensorBytes": tensor_bytes(files)}


def _what_else(files: CheckpointFiles) -> str:
    """What a source without config.json is, where its files tell."""
    try:
        names = files.names()
    except CheckpointError:
        return ""
    found = next((text for mark, text in _OTHERS.items() if any(n.endswith(mark) for n in names)), "")
    return f"it is {found}" if found else ""


def _parse_config(data: bytes, name: str = MODEL_CONFIG) -> dict[str, Any]:
    try:
        loaded = json.loads(data)
    except ValueError as error:
        raise BrokenConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise BrokenConfigError(f"{name} is not an object")
    return loaded


def _rank_of(config: Mapping[str, Any]) -> int:
    """The highest rank of an adapter: PEFT's ``r``, and what ``rank_pattern`` gives some modules instead."""
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    highest = 0
    for rank in ranks:
        if type(rank) is not int or not 0 < rank <= MAX_RANK:
            raise BrokenConfigError(f"{ADAPTER_CONFIG} has no LoRA rank: {str(rank)[:40]}")
        highest = max(highest, rank)
    return highest


def _facts(source: str, files: CheckpointFiles, checkpoint: Mapping[str, Any]) -> ModelFacts:
    config = with_class_defaults(checkpoint["config"])
    return facts_from_config(
        config, tensor_bytes=checkpoint["tensorBytes"], source=source, revision=files.revision() or ""
    )


def with_class_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A config with what its Transformers class fills in; as it is where Transformers doesn't know it.

    Checkpoints leave out what equals their class's default: Gemma 3's text section names neither heads nor
    vocabulary. The checkpoint's own values win.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return config
    try:
        known = _auto_config().for_model(model_type, **{k: v for k, v in config.items() if k != "model_type"})
        defaults = known.to_dict()
    except Exception as error:  # noqa: BLE001  (a foreign class may raise anything; the raw config may do)
        log.debug("no defaults from Transformers", extra={"modelType": model_type, "error": str(error)})
        return config
    return _under(config, defaults)


def _auto_config() -> Any:
    """Transformers' registry of configurations; seconds to import, so only where facts are read.

    Its lazy module is not safe to import from several threads at once.
    """
    with _IMPORT:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is meant so
        from transformers import AutoConfig  # noqa: PLC0415

        return AutoConfig


def _under(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for name, value in config.items():
        below = merged.get(name)
        merged[name] = _under(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
