"""vLLM 0.32 and 0.33: https://docs.vllm.ai/en/stable/cli/serve/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from modelfleet_serving.contract import ApplicationArgs, EngineSettings, LoraSettings, Task
from modelfleet_serving.engines.base import (
    KEEP_ALIVE_SECONDS,
    Drain,
    Launch,
    Platform,
    Probe,
    SettingsProblem,
)
from modelfleet_serving.engines.options import (
    args_problems,
    env_problems,
    merge,
    one_of,
    option,
    render,
    settings_problems,
    shared_environment,
    shared_options,
    whole_seconds,
)
from modelfleet_serving.engines.vllm_interface import VLLMInterface

DTYPES: Final = frozenset({"auto", "bfloat16", "float", "float16", "float32", "half"})
KV_CACHE_DTYPES: Final = frozenset(
    {
        "auto",
        "bfloat16",
        "float16",
        "fp8",
        "fp8_ds_mla",
        "fp8_e4m3",
        "fp8_e5m2",
        "fp8_inc",
        "fp8_per_token_head",
        "int4_per_token_head",
        "int8_per_token_head",
        "nvfp4",
        "nvfp4_4over6",
        "nvfp4_ds_mla",
        "turboquant_3bit_nc",
        "turboquant_4bit_nc",
        "turboquant_k3v4_nc",
        "turboquant_k8v4",
        "ultraquant_4bit",
    }
)
"""Those that 0.32 and 0.33 share."""
LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
FLAGS: Final = frozenset(
    {
        "aggregate-engine-logging",
        "data-parallel-multi-port-external-lb",
        "disable-log-stats",
        "grpc",
        "headless",
    }
)
"""Options that are bare flags, without the ``--no-`` form that all others have."""

_PLATFORM = "the platform"
RESERVED: Final = {
    "api-key": "the router, which is where keys are checked",
    "api-server-count": _PLATFORM,
    "config": "the other options of engine.args; a file would hide them from the planner",
    "data-parallel-address": _PLATFORM,
    "data-parallel-external-lb": _PLATFORM,
    "data-parallel-hybrid-lb": _PLATFORM,
    "data-parallel-multi-port-external-lb": _PLATFORM,
    "data-parallel-rank": _PLATFORM,
    "device-memory-utilization": "engine.gpuMemoryPercent",
    "dtype": "engine.dtype",
    "enable-auto-tool-choice": "engine.toolCallParser",
    "enable-chunked-prefill": "engine.chunkedPrefill",
    "enable-lora": "engine.lora",
    "enable-prefix-caching": "engine.prefixCaching",
    "gpu-memory-utilization": "engine.gpuMemoryPercent",
    "grpc": _PLATFORM,
    "grpc-port": _PLATFORM,
    "headless": _PLATFORM,
    "hf-token": "the secret of the model's source; a token in a command line can be read by everyone",
    "host": _PLATFORM,
    "kv-cache-dtype": "engine.kvCacheDtype",
    "kv-cache-memory-bytes": "engine.kvCacheMemory",
    "limit-mm-per-prompt": "engine.multimodal",
    "load-format": _PLATFORM,
    "lora-modules": "the adapters of the ModelDeployment",
    "master-addr": _PLATFORM,
    "master-port": _PLATFORM,
    "max-cpu-loras": "engine.lora.maxCpuLoras",
    "max-lora-rank": "engine.lora.maxRank",
    "max-loras": "engine.lora.maxLoras",
    "max-model-len": "engine.maxModelLen",
    "max-num-batched-tokens": "engine.maxNumBatchedTokens",
    "max-num-seqs": "engine.maxNumSeqs",
    "model": "the source of the model",
    "nnodes": _PLATFORM,
    "node-rank": _PLATFORM,
    "pipeline-parallel-size": "engine.pipelineParallelSize",
    "port": _PLATFORM,
    "quantization": "the quantization of the variant",
    "reasoning-parser": "engine.reasoningParser",
    "revision": "the source of the model",
    "root-path": _PLATFORM,
    "runner": "the task of the model",
    "served-model-name": "the name of the model",
    "shutdown-timeout": "rollout.drainTimeout",
    "ssl-ca-certs": _PLATFORM,
    "ssl-cert-reqs": _PLATFORM,
    "ssl-certfile": _PLATFORM,
    "ssl-keyfile": _PLATFORM,
    "tensor-parallel-size": "engine.tensorParallelSize",
    "tool-call-parser": "engine.toolCallParser",
    "trust-remote-code": "engine.trustRemoteCode",
    "uds": _PLATFORM,
}
OWNED_ENV: Final = {
    "CUDA_VISIBLE_DEVICES": _PLATFORM,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "engine.lora",
    "VLLM_API_KEY": "the router, which is where keys are checked",
    "VLLM_CPU_KVCACHE_SPACE": "engine.kvCacheMemory",
    "VLLM_ENGINE_READY_TIMEOUT_S": "the start deadline",
    "VLLM_MEDIA_CACHE": _PLATFORM,
}

_POOLING: Final = frozenset({Task.EMBED, Task.RERANK, Task.SCORE, Task.CLASSIFY})
_TOKENIZE: Final = frozenset({"/tokenize", "/detokenize"})
_SCORING: Final = frozenset({"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/pooling"})
_PATHS: Final = {
    Task.GENERATE: frozenset(
        {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
        }
    )
    | _TOKENIZE,
    Task.EMBED: frozenset({"/v1/embeddings", "/v2/embed", "/pooling"}) | _TOKENIZE,
    Task.RERANK: _SCORING | _TOKENIZE,
    Task.SCORE: _SCORING | _TOKENIZE,
    Task.CLASSIFY: frozenset({"/classify", "/pooling"}) | _TOKENIZE,
    Task.TRANSCRIBE: frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"}),
}
"""As vLLM registers them by the tasks that a model supports."""

CPU_MEMORY_SHARE: Final = 0.3
"""Of a machine's memory, where nothing else says it: vLLM's default of 0.92 lets no second engine start."""


class VLLM(VLLMInterface):
    """vLLM's OpenAI server.

    It sleeps only with args {enable-sleep-mode: true} and env VLLM_SERVER_DEV_MODE=1, which opens an RPC
    endpoint as well: for engines that bind loopback. It takes adapters while it runs only with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING, which is set where it has LoRA.
    """

    name: ClassVar[str] = "vLLM"
    liveness: ClassVar[Probe] = Probe("/health", timeout_seconds=10)
    # It finishes what runs, at most --shutdown-timeout. Past that it kills its workers, and then waits for
    # the streams that they left open, for ever (0.32, measured).
    drain: ClassVar[Drain] = Drain(bounded=False)
    paths: ClassVar[Mapping[Task, frozenset[str]]] = _PATHS

    def problems(self, args: ApplicationArgs, launch: Launch) -> list[SettingsProblem]:
        """Everything that makes this start impossible."""
        settings = args.engine
        found = [
            *settings_problems(args, launch, self.name),
            *args_problems(settings.args, RESERVED, flags=FLAGS),
            *env_problems(settings.env, OWNED_ENV),
            *one_of("engine.dtype", settings.dtype, DTYPES),
            *one_of("engine.kvCacheDtype", settings.kv_cache_dtype, KV_CACHE_DTYPES),
        ]
        lora = settings.lora
        if lora is not None and lora.max_rank not in LORA_RANKS:
            allowed = "one of " + ", ".join(map(str, LORA_RANKS)) + ": the next one above the adapters' rank"
            found.append(SettingsProblem("engine.lora.maxRank", lora.max_rank, allowed))
        return found

    def _command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        settings = args.engine
        typed: dict[str, Any] = {
            **shared_options(args, launch),
            "runner": "pooling" if args.task in _POOLING else None,
            "shutdown-timeout": whole_seconds(args.drain_timeout_seconds),
            **_memory(settings, launch.platform),
            **_batching(settings),
            "tensor-parallel-size": settings.tensor_parallel_size,
            "pipeline-parallel-size": settings.pipeline_parallel_size,
            "enable-auto-tool-choice": True if settings.tool_call_parser else None,
            "limit-mm-per-prompt": settings.multimodal_limits or None,
            **_lora(settings.lora),
        }
        defaults: dict[str, Any] = {"disable-uvicorn-access-log": True, "enable-prompt-tokens-details": True}
        if launch.platform is Platform.CPU:
            defaults["enforce-eager"] = True  # compiling takes minutes on a CPU and gains little
        return [*_entrypoint(launch), *render(typed), *render(merge(defaults, settings.args))]

    def _environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:
        env = {
            **shared_environment(launch),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
            # vLLM gives its own workers 600 s, whatever deadline the start has.
            "VLLM_ENGINE_READY_TIMEOUT_S": str(whole_seconds(args.start_timeout_seconds)),
        }
        if launch.platform is Platform.CPU:
            # Binding threads to cores lets engines on one machine fight for the same cores.
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # As many threads as cores were reserved: two engines with a thread per core each spin at their
            # barriers against one another.
            env["OMP_NUM_THREADS"] = str(max(1, int(args.resources.num_cpus)))
        if args.engine.lora is not None:
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if launch.media_cache is not None:
            env["VLLM_MEDIA_CACHE"] = launch.media_cache
        return env


def _entrypoint(launch: Launch) -> list[str]:
    if launch.platform is Platform.CPU:
        # The `vllm` command looks up a distribution named "vllm", which vllm-cpu doesn't have.
        return [launch.python, "-m", "vllm.entrypoints.openai.api_server", option("model", launch.model)]
    return [launch.python, "-m", "vllm.entrypoints.cli.main", "serve", launch.model]


def _memory(settings: EngineSettings, platform: Platform) -> dict[str, Any]:
    share = settings.gpu_memory_percent / 100 if settings.gpu_memory_percent is not None else None
    if share is None and settings.kv_cache_memory_bytes is None and platform is Platform.CPU:
        share = CPU_MEMORY_SHARE
    return {
        "max-model-len": settings.max_model_len,
        "gpu-memory-utilization": share,
        "kv-cache-memory-bytes": settings.kv_cache_memory_bytes,
        "enable-prefix-caching": settings.prefix_caching,
    }


def _batching(settings: EngineSettings) -> dict[str, Any]:
    return {
        "max-num-seqs": settings.max_num_seqs,
        "enable-chunked-prefill": settings.chunked_prefill,
        "max-num-batched-tokens": settings.max_num_batched_tokens,
    }


def _lora(lora: LoraSettings | None) -> dict[str, Any]:
    if lora is None:
        return {}
    return {
        "enable-lora": True,
        "max-loras": lora.max_loras,
        "max-lora-rank": lora.max_rank,
        "max-cpu-loras": lora.max_cpu_loras,
    }
