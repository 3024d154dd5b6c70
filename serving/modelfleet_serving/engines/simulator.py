"""The simulator: an engine without a model, see :mod:`modelfleet_serving.simulator`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from modelfleet_serving.contract import ApplicationArgs, Task
from modelfleet_serving.engines.base import Drain, Launch, Probe, SettingsProblem
from modelfleet_serving.engines.options import (
    args_problems,
    canonical,
    env_problems,
    render,
    settings_problems,
    whole_seconds,
)
from modelfleet_serving.engines.vllm_interface import VLLMInterface

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

_TOKENIZE: Final = frozenset({"/tokenize", "/detokenize"})
_SCORING: Final = frozenset({"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"})
_PATHS: Final = {
    Task.GENERATE: frozenset({"/v1/chat/completions", "/v1/completions"}) | _TOKENIZE,
    Task.EMBED: frozenset({"/v1/embeddings"}) | _SCORING | _TOKENIZE,
    Task.RERANK: _SCORING | _TOKENIZE,
    Task.SCORE: _SCORING | _TOKENIZE,
    Task.CLASSIFY: frozenset({"/classify"}) | _TOKENIZE,
}


class Simulator(VLLMInterface):
    """An engine's timing, queueing and faults, for capacity planning and tests.

    Settings that say nothing about time (data types, quantization, parsers) are taken and have no effect,
    so that a deployment can be tried as it is by changing ``engine.type`` alone.
    """

    name: ClassVar[str] = "Simulator"
    liveness: ClassVar[Probe] = Probe("/health")
    drain: ClassVar[Drain] = Drain(grace_seconds=5)
    paths: ClassVar[Mapping[Task, frozenset[str]]] = _PATHS

    def problems(self, args: ApplicationArgs, launch: Launch) -> list[SettingsProblem]:
        """Everything that makes this start impossible."""
        return [
            *settings_problems(args, launch, self.name),
            *args_problems(args.engine.args, RESERVED),
            *env_problems(args.engine.env, {}),
            *_unknown(args),
        ]

    def _command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        settings = args.engine
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
            "enable-lora": settings.lora is not None,
            "max-loras": settings.lora.max_loras if settings.lora else None,
        }
        free = {canonical(name): value for name, value in settings.args.items()}
        faults = free.pop("fault", None) or []
        orders = [f"--fault={order}" for order in ([faults] if isinstance(faults, str) else faults)]
        return [launch.python, "-m", "modelfleet_serving.simulator", *render(typed), *render(free), *orders]

    def _environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:  # noqa: ARG002  it reads none
        return {}


def _unknown(args: ApplicationArgs) -> Iterator[SettingsProblem]:
    for name, value in args.engine.args.items():
        if canonical(name) not in OPTIONS and canonical(name).removeprefix("no-") not in RESERVED:
            allowed = "one of " + ", ".join(sorted(OPTIONS))
            yield SettingsProblem(
                f"engine.args.{name}", value, f"the simulator has no such option: {allowed}"
            )
    if args.task not in _PATHS:
        yield SettingsProblem("model.task", args.task.value, "one of " + ", ".join(_PATHS))
