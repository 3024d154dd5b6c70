"""What a simulator is started with."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from functools import cache
from typing import Final

import msgspec

from modelfleet_serving.simulator.faults import Faults
from modelfleet_serving.simulator.scheduler import Limits, Speed

GIB: Final = 2**30
TASKS: Final = ("any", "generate", "embed", "rerank", "score", "classify")
NO_FAULTS: Final = Faults()
SCALING_EFFICIENCY: Final = 0.85
"""What each further GPU of a tensor parallel group adds, as a share of the first."""


class Profile(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model on an accelerator, as ``profiles.json`` describes it. Computed, not measured."""

    description: str
    weights_gib: float
    kv_cache_gib: float
    kv_bytes_per_token: int
    max_model_len: int
    max_num_seqs: int
    prefill_base_ms: float
    prefill_tokens_per_second: float
    decode_base_ms: float
    decode_per_sequence_us: float


@cache
def profiles() -> dict[str, Profile]:
    """The presets by name."""
    data = importlib.resources.files(__package__).joinpath("profiles.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, Profile])


@dataclass(frozen=True, kw_only=True)
class Config:
    """One simulator, with every default filled in."""

    model: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    """Names and paths of the adapters that are there from the start."""
    task: str = "any"
    host: str = "127.0.0.1"
    port: int = 8000
    profile: str = "fast"
    max_model_len: int
    limits: Limits
    speed: Speed
    weights_gib: float
    kv_cache_gib: float
    seed: int = 0
    output_tokens: int = 128
    """Mean length of an answer whose request has no limit."""
    embedding_size: int = 384
    start_delay: float = 0.0
    shutdown_timeout: float = 0.0
    enable_lora: bool = True
    faults: Faults = NO_FAULTS

    @property
    def names(self) -> tuple[str, ...]:
        """The model's own names."""
        return (self.model, *self.aliases)

    @property
    def kv_cache_tokens(self) -> int:
        """Size of the KV cache."""
        return self.limits.kv_blocks * self.limits.block_size
