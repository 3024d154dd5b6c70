"""vLLM's server as it looks from outside, which is also how the simulator looks."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

import msgspec.structs

from modelfleet_serving.contract import EngineMemory
from modelfleet_serving.engines.base import AdapterCalls, Call, EngineAdapter, Probe, Sleep
from modelfleet_serving.engines.exposition import LoadMetrics

_WEIGHTS: Final = re.compile(r"Model loading took ([\d.]+) GiB")
# On a CPU the loader says nothing; what lies on the disk is the same but for the alignment.
_CHECKPOINT: Final = re.compile(r"Checkpoint size: ([\d.]+) GiB")
_KV_GIB: Final = re.compile(r"Available KV cache memory: ([\d.]+) GiB")
_KV_GIB_CPU: Final = re.compile(r"(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) GiB for KV cache")
_KV_TOKENS: Final = re.compile(r"KV cache size: ([\d,]+) tokens")
_MAX_LEN: Final = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request")


class VLLMInterface(EngineAdapter):
    """The probes, metrics, log lines and management calls of vLLM 0.32 and 0.33.

    ``/health`` answers 200 while the engine sleeps (requests hang) and while it drains (requests get
    500): it tells a broken engine from a working one and nothing else.
    """

    readiness: ClassVar[Probe] = Probe("/health")
    load_metrics: ClassVar[LoadMetrics] = LoadMetrics(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_cache_usage="vllm:kv_cache_usage_perc",
    )
    sleep: ClassVar[Sleep | None] = Sleep(sleep=Call("POST", "/sleep?level=1"), wake=Call("POST", "/wake_up"))
    adapter_calls: ClassVar[AdapterCalls] = AdapterCalls(
        load="/v1/load_lora_adapter", unload="/v1/unload_lora_adapter", not_loaded=404
    )

    def read_log(self, line: str, known: EngineMemory) -> EngineMemory:
        """From the lines of the loader, the worker and the KV cache planner."""
        changes: dict[str, Any] = {}
        if (match := _WEIGHTS.search(line)) or (
            known.weights_gib is None and (match := _CHECKPOINT.search(line))
        ):
            changes["weights_gib"] = float(match[1])
        if match := _KV_GIB.search(line) or _KV_GIB_CPU.search(line):
            changes["kv_cache_gib"] = float(match[1])
        if match := _KV_TOKENS.search(line):
            changes["kv_cache_tokens"] = int(match[1].replace(",", ""))
        if match := _MAX_LEN.search(line):
            changes["max_model_len"] = int(match[1].replace(",", ""))
        return msgspec.structs.replace(known, **changes) if changes else known
