"""The simulator: an engine without a model, see :mod:`modelfleet_serving.simulator`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import msgspec.structs

from modelfleet_serving.contract import ApplicationArgs, EngineMemory, EngineSettings, Task
from modelfleet_serving.engines.base import (
    Call,
    Drain,
    EngineAdapter,
    EngineSettingsError,
    Launch,
    Probe,
    SettingsProblem,
    Sleep,
)
from modelfleet_serving.engines.exposition import LoadMetrics
from modelfleet_serving.engines.options import (
    args_problems,
    canonical,
    env_problems,
    render,
    settings_problems,
    whole_seconds,
)

OPTIONS: Final = frozenset(
    {
        "block-size",
        "decode-base-ms",
        "decode-per-sequence-us",
        "embedding-size",
        "fault",
        "jitter",
        "kv-cache-tokens",
        "max-num-queued-reqs",
        "output-tokens",
        "prefill-base-ms",
        "prefill-tokens-per-second",
        "profile",
        "seed",
        "start-delay",
    }
)
"""What ``engine.args`` may hold."""
RESERVED: Final = {
    "enable-chunked-prefill": "engine.chunkedPrefill",
    "enable-lora": "engine.lora",
    "enable-prefix-caching": "engine.prefixCaching",
    "host": "the platform",
    "kv-cache-memory-bytes": "engine.kvCacheMemoryBytes",
    "lora-modules": "the adapters of the ModelDeployment",
    "max-loras": "engine.lora.maxLoras",
    "max-model-len": "engine.maxModelLen",
    "max-num-batched-tokens": "engine.maxNumBatchedTokens",
    "max-num-seqs": "engine.maxNumSeqs",
    "model": "the source of the model",
    "port": "the platform",
    "served-model-name": "the name of the model",
    "shutdown-timeout": "rollout.drainTimeout",
    "task": "the task of the model",
    "tensor-parallel-size": "engine.tensorParallelSize",
}

_SCORING: Final = frozenset({"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"})
_ENDPOINTS: Final = {
    Task.GENERATE: frozenset({"/v1/chat/completions", "/v1/completions"}),
    Task.EMBED: frozenset({"/v1/embeddings"}) | _SCORING,
    Task.RERANK: _SCORING,
    Task.SCORE: _SCORING,
    Task.CLASSIFY: frozenset({"/classify"}),
}

_WEIGHTS: Final = re.compile(r"Model loading took ([\d.]+) GiB")
_KV_GIB: Final = re.compile(r"Available KV cache memory: ([\d.]+) GiB")
_KV_TOKENS: Final = re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens")


class Simulator(EngineAdapter):
    """An engine's timing, queueing and faults, for capacity planning and tests.

    Settings that say nothing about time (data types, quantization, parsers) are taken and have no effect,
    so that a deployment can be tried as it is by changing ``engine.type`` alone.
    """

    name: ClassVar[str] = "Simulator"
    readiness: ClassVar[Probe] = Probe("/health")
    liveness: ClassVar[Probe] = Probe("/health")
    load_metrics: ClassVar[LoadMetrics] = LoadMetrics(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_cache_usage="vllm:kv_cache_usage_perc",
    )
    drain: ClassVar[Drain] = Drain(grace_seconds=5)
    sleep: ClassVar[Sleep | None] = Sleep(sleep=Call("POST", "/sleep?level=1"), wake=Call("POST", "/wake_up"))

    def problems(self, args: ApplicationArgs, launch: Launch) -> list[SettingsProblem]:
        """Everything that makes this start impossible."""
        return [
            *settings_problems(args, launch, self.name),
            *args_problems(args.engine.args, RESERVED),
            *env_problems(args.engine.env, {}),
            *_unknown(args),
        ]

    def command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        """``python -m modelfleet_serving.simulator`` with every option."""
        self._check(args, launch)
        settings = args.engine
        modules = [{"name": name, "path": path} for name, path in launch.adapters.items()]
        typed: dict[str, Any] = {
            "model": launch.model,
            "served-model-name": args.model,
            "task": args.task.value.lower(),
            "host": launch.host,
            "port": launch.port,
            "shutdown-timeout": whole_seconds(args.drain_timeout_seconds),
            "max-model-len": settings.max_model_len,
            "kv-cache-memory-bytes": settings.kv_cache_memory_bytes,
            "max-num-seqs": settings.max_num_seqs,
            "max-num-batched-tokens": settings.max_num_batched_tokens,
            "enable-chunked-prefill": settings.chunked_prefill,
            "enable-prefix-caching": settings.prefix_caching,
            "tensor-parallel-size": settings.tensor_parallel_size,
            "enable-lora": bool(settings.lora or args.adapters or launch.adapters),
            "max-loras": settings.lora.max_loras if settings.lora else None,
            "lora-modules": modules or None,
        }
        free = {canonical(name): value for name, value in settings.args.items()}
        faults = free.pop("fault", None) or []
        orders = [f"--fault={order}" for order in ([faults] if isinstance(faults, str) else faults)]
        return [launch.python, "-m", "modelfleet_serving.simulator", *render(typed), *render(free), *orders]

    def environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:
        """Nothing but what the user sets."""
        self._check(args, launch)
        return dict(args.engine.env)

    def endpoints(self, task: Task) -> frozenset[str]:
        """What the simulator answers; it transcribes nothing."""
        paths = _ENDPOINTS.get(task)
        return paths | {"/tokenize", "/detokenize"} if paths else frozenset()

    def capacity(self, settings: EngineSettings) -> int | None:
        """The profile's own limit isn't known here."""
        return settings.max_num_seqs

    def read_log(self, line: str, known: EngineMemory) -> EngineMemory:
        """From what it prints at the start."""
        changes: dict[str, Any] = {}
        if match := _WEIGHTS.search(line):
            changes["weights_gib"] = float(match[1])
        if match := _KV_GIB.search(line):
            changes["kv_cache_gib"] = float(match[1])
        if match := _KV_TOKENS.search(line):
            changes["kv_cache_tokens"] = int(match[1].replace(",", ""))
            changes["max_model_len"] = int(match[2].replace(",", ""))
        return msgspec.structs.replace(known, **changes) if changes else known

    def load_adapter(self, name: str, path: str) -> Call:
        """As vLLM's."""
        return Call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_adapter(self, name: str) -> Call:
        """As vLLM's."""
        return Call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, success=frozenset({200, 404}))

    def _check(self, args: ApplicationArgs, launch: Launch) -> None:
        if problems := self.problems(args, launch):
            raise EngineSettingsError(self.name, problems)


def _unknown(args: ApplicationArgs) -> Iterator[SettingsProblem]:
    for name, value in args.engine.args.items():
        if canonical(name) not in OPTIONS and canonical(name).removeprefix("no-") not in RESERVED:
            allowed = "one of " + ", ".join(sorted(OPTIONS))
            yield SettingsProblem(
                f"engine.args.{name}", value, f"the simulator has no such option: {allowed}"
            )
    if args.task not in _ENDPOINTS:
        yield SettingsProblem("model.task", args.task.value, "one of " + ", ".join(_ENDPOINTS))
