"""What each version of an engine does by default, where it decides about memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from modelfleet_operator.catalog.accelerators import Accelerator


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """Tokens and sequences of one step."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Memory that an engine leaves beside its share, in MiB."""

    base: float
    per_token: float
    per_sequence: float
    per_rank: float
    large_gib: float
    large: float

    def share(self, memory_gib: float, batch: BatchDefaults, ranks: int) -> float:
        """Share of the GPU that weights and KV cache may take, 0..1."""
        reserved = self.base + max(batch.tokens, 2048) * self.per_token
        reserved += batch.sequences * self.per_sequence + ranks * self.per_rank
        if memory_gib > self.large_gib:
            reserved = max(reserved, self.large)
        return max(1 - reserved / (memory_gib * 1024), 0.0)


@dataclass(frozen=True, slots=True)
class EngineDefaults:
    """Defaults of one engine from one version on; sizes in tokens.

    Attributes:
        engine: name of the engine.
        version: the exact version asked about.
        memory_percent: share of the GPU that the engine takes.
        block_size: tokens of a KV cache block.
        cpu_block_size: the same on a CPU.
        concurrent_batches: steps in flight at once.
        runner_v2: models on vLLM's newer model runner: ``dense``, ``all`` or ``none``.
        runner_v2_experts: architectures with experts that are on it where dense ones are.
        graphs_reserved: runners that set memory for CUDA graphs aside before the KV cache is sized.
        buffers_counted: whether buffers made before profiling are counted.
        encoder_profiled: runners that run the vision encoder when they profile.
        static_share: the share holds weights and KV cache only.
        cross_attention_by_batch: a request's cross attention is set aside for a batch's tokens.
        narrow_state: linear layers keep their state in the model's type where it asks for no other.
        batch: tokens and sequences of a step, by memory of the GPU.
        cpu_batch: the same on a CPU.
        reserve: how the share is worked out where the user names none.
    """

    engine: str
    version: str
    memory_percent: int
    block_size: int
    cpu_block_size: int
    concurrent_batches: int
    runner_v2: str
    graphs_reserved: frozenset[str]
    buffers_counted: bool
    encoder_profiled: frozenset[str]
    static_share: bool
    batch: tuple[tuple[float, BatchDefaults, frozenset[str]], ...]
    cpu_batch: BatchDefaults
    reserve: Reserve | None = None
    runner_v2_experts: frozenset[str] = frozenset()
    cross_attention_by_batch: bool = False
    narrow_state: bool = False

    def batch_for(self, accelerator: Accelerator) -> BatchDefaults:
        """Tokens and sequences of a step on this accelerator."""
        if accelerator.is_cpu:
            return self.cpu_batch
        for memory_gib, defaults, exceptions in self.batch:
            if accelerator.memory_gib >= memory_gib and accelerator.name not in exceptions:
                return defaults
        return self.batch[-1][1]


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions: the numbers of ``0.33.0`` or ``0.5.10rc1``."""
    parts: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


@cache
def _data() -> Mapping[str, Any]:
    text = files(__package__).joinpath("engines.yaml").read_text(encoding="utf-8")
    loaded: Mapping[str, Any] = yaml.safe_load(text)
    return loaded


def default_version(engine: str) -> str | None:
    """The version that this release was tested with; ``None`` for engines without memory of their own."""
    entry = _data().get(engine)
    return str(entry["default"]) if entry else None


def oldest_version(engine: str) -> str | None:
    """The oldest version that anything is known of."""
    entry = _data().get(engine)
    if entry is None:
        return None
    return min((str(v["from"]) for v in entry["versions"]), key=version_key)


@cache
def engine_defaults(engine: str, version: str | None = None) -> EngineDefaults | None:
    """Defaults of a version; of the oldest known for older ones; ``None`` for unknown engines."""
    entry = _data().get(engine)
    if entry is None:
        return None
    version = version or str(entry["default"])
    versions = sorted(entry["versions"], key=lambda v: version_key(str(v["from"])), reverse=True)
    found = next((v for v in versions if version_key(str(v["from"])) <= version_key(version)), versions[-1])
    return EngineDefaults(
        engine=engine,
        version=version,
        memory_percent=int(found["memoryPercent"]),
        block_size=int(found["blockSize"]),
        cpu_block_size=int(found["cpuBlockSize"]),
        concurrent_batches=int(found["concurrentBatches"]),
        runner_v2=str(found["runnerV2"]),
        graphs_reserved=frozenset(found["graphsReserved"]),
        buffers_counted=bool(found["buffersCounted"]),
        encoder_profiled=frozenset(found["encoderProfiled"]),
        static_share=bool(found["staticShare"]),
        batch=tuple(
            (
                float(b["memoryGiB"]),
                BatchDefaults(b["tokens"], b["sequences"]),
                frozenset(b.get("except", ())),
            )
            for b in found["batch"]
        ),
        cpu_batch=BatchDefaults(found["cpuBatch"]["tokens"], found["cpuBatch"]["sequences"]),
        reserve=_reserve(found["reserve"]) if "reserve" in found else None,
        runner_v2_experts=frozenset(found.get("runnerV2Experts", ())),
        cross_attention_by_batch=bool(found.get("crossAttentionByBatch", False)),
        narrow_state=bool(found.get("narrowState", False)),
    )


def _reserve(entry: Mapping[str, Any]) -> Reserve:
    return Reserve(
        base=float(entry["baseMiB"]),
        per_token=float(entry["perTokenMiB"]),
        per_sequence=float(entry["perSequenceMiB"]),
        per_rank=float(entry["perRankMiB"]),
        large_gib=float(entry["largeGiB"]),
        large=float(entry["largeMiB"]),
    )
