"""Bytes of a checkpoint's tensors by dtype, from safetensors headers alone."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from modelfleet_operator.planner.fields import BrokenConfigError

if TYPE_CHECKING:
    from modelfleet_operator.clients.checkpoint_files import CheckpointFiles

MAX_HEADER_BYTES = 100 * 2**20
"""The format's own limit."""
MAX_INDEX_BYTES = 64 * 2**20
NOT_LOADED = ("model.mtp.", "mtp.")
"""Tensors that engines load for speculative decoding only."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONSOLIDATED = "consolidated"


def tensor_bytes(files: CheckpointFiles) -> dict[str, int]:
    """Bytes by dtype, as safetensors names them (``BF16``, ``F8_E4M3``, ``I32``); empty without such files.

    Raises:
        BrokenConfigError: an index or a header is not what the format says.
        CheckpointError: a file can't be read.
    """
    total: Counter[str] = Counter()
    for name in shard_names(files):
        total.update(parse_header(files.header(name), name))
    return dict(total)


def shard_names(files: CheckpointFiles) -> list[str]:
    """The safetensors files that an engine loads."""
    index = files.read_optional(INDEX, MAX_INDEX_BYTES)
    if index is not None:
        try:
            return sorted(set(json.loads(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BrokenConfigError(f"{INDEX} has no weight_map: {error}") from error
    names = [name for name in files.names() if name.endswith(".safetensors")]
    if SINGLE in names:
        return [SINGLE]
    # Mistral's second copy of the same weights
    return sorted(name for name in names if not name.startswith(CONSOLIDATED)) or sorted(names)


def parse_header(header: bytes, name: str) -> Counter[str]:
    """Bytes by dtype of one file's header."""
    try:
        entries = json.loads(header)
        sizes: Counter[str] = Counter()
        for tensor, entry in entries.items():
            if tensor == "__metadata__" or tensor.startswith(NOT_LOADED):
                continue
            begin, end = entry["data_offsets"]
            sizes[str(entry["dtype"])] += int(end) - int(begin)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BrokenConfigError(f"{name} has a broken safetensors header: {error}") from error
    return sizes
