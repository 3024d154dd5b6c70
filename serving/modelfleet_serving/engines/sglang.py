"""SGLang 0.5: https://docs.sglang.io/advanced_features/server_arguments.html."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

import msgspec.structs

from modelfleet_serving.contract import ApplicationArgs, EngineMemory, EngineSettings, LoraSettings, Task
from modelfleet_serving.engines.base import (
    KEEP_ALIVE_SECONDS,
    AdapterCalls,
    Call,
    Drain,
    EngineAdapter,
    Launch,
    Platform,
    Probe,
    SettingsProblem,
    Sleep,
)
from modelfleet_serving.engines.exposition import LoadMetrics
from modelfleet_serving.engines.options import (
    args_problems,
    canonical,
    env_problems,
    merge,
    one_of,
    render,
    settings_problems,
    shared_environment,
    shared_options,
)

DTYPES: Final = frozenset({"auto", "bfloat16", "float", "float16", "float32", "half"})
KV_CACHE_DTYPES: Final = frozenset(
    {"auto", "bf16", "bfloat16", "fp4_mx_block16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "nvfp4"}
)
LOAD_FORMATS: Final = frozenset(
    {
        "auto",
        "bitsandbytes",
        "dummy",
        "expert_pack",
        "fastsafetensors",
        "flash_rl",
        "gguf",
        "instanttensor",
        "layered",
        "mistral",
        "npcache",
        "presharded",
        "private",
        "pt",
        "remote",
        "remote_instance",
        "runai_streamer",
        "safetensors",
        "sharded_state",
    }
)
QUANTIZATIONS: Final = frozenset(
    {
        "auto-round",
        "auto-round-int8",
        "awq",
        "awq_marlin",
        "bitsandbytes",
        "compressed-tensors",
        "fp8",
        "gguf",
        "gptq",
        "gptq_marlin",
        "humming",
        "mlx_q4",
        "mlx_q8",
        "modelopt",
        "modelopt_fp4",
        "modelopt_fp8",
        "modelopt_mixed",
        "modelslim",
        "moe_wna16",
        "mxfp4",
        "mxfp8",
        "mxfp_w4a8",
        "nvfp4_online",
        "petit_nvfp4",
        "quark",
        "quark_int4fp8_moe",
        "quark_mxfp4",
        "unquant",
        "w4afp8",
        "w8a8_fp8",
        "w8a8_int8",
    }
)

_PLATFORM = "the platform"
RESERVED: Final = {
    "admin-api-key": "the router, which is where keys are checked",
    "api-key": "the router, which is where keys are checked",
    "chunked-prefill-size": "engine.chunkedPrefill and engine.maxNumBatchedTokens",
    "config": "the other options of engine.args; a file would hide them from the planner",
    "context-length": "engine.maxModelLen",
    "device": _PLATFORM,
    "disable-radix-cache": "engine.prefixCaching",
    "dist-init-addr": _PLATFORM,
    "dtype": "engine.dtype",
    "enable-lora": "engine.lora",
    "enable-metrics": _PLATFORM,
    "encoder-only": _PLATFORM,
    "grpc-mode": _PLATFORM,
    "grpc-port": _PLATFORM,
    "host": _PLATFORM,
    "kv-cache-dtype": "engine.kvCacheDtype",
    "limit-mm-data-per-request": "engine.multimodal",
    "load-format": _PLATFORM,
    "lora-paths": "the adapters of the ModelDeployment",
    "max-loaded-loras": "engine.lora.maxCpuLoras",
    "max-lora-rank": "engine.lora.maxRank",
    "max-loras-per-batch": "engine.lora.maxLoras",
    "max-prefill-tokens": "engine.maxNumBatchedTokens",
    "max-running-requests": "engine.maxNumSeqs",
    "mem-fraction-static": "engine.gpuMemoryPercent",
    "model": "the source of the model",
    "model-path": "the source of the model",
    "nccl-init-addr": _PLATFORM,
    "nnodes": _PLATFORM,
    "node-rank": _PLATFORM,
    "pipeline-parallel-size": "engine.pipelineParallelSize",
    "port": _PLATFORM,
    "pp-size": "engine.pipelineParallelSize",
    "quantization": "the quantization of the variant",
    "reasoning-parser": "engine.reasoningParser",
    "revision": "the source of the model",
    "served-model-name": "the name of the model",
    "smg-grpc-mode": _PLATFORM,
    "ssl-ca-certs": _PLATFORM,
    "ssl-certfile": _PLATFORM,
    "ssl-keyfile": _PLATFORM,
    "ssl-keyfile-password": _PLATFORM,
    "tensor-parallel-size": "engine.tensorParallelSize",
    "tool-call-parser": "engine.toolCallParser",
    "tp-size": "engine.tensorParallelSize",
    "trust-remote-code": "engine.trustRemoteCode",
    "use-ray": _PLATFORM,
}
OWNED_ENV: Final = {"CUDA_VISIBLE_DEVICES": _PLATFORM}
NEGATABLE: Final = frozenset(
    {
        "dcp-replicate-q-proj",
        "dllm-fdfo",
        "enable-decoder-swa-bounded-replay",
        "enable-dsa-fused-indexer",
        "enable-fused-qk-norm-rope",
        "enable-tf32-matmul",
        "enable-tp-lm-head-all-to-all",
        "experts-shared-outer-loras",
        "lora-strict-loading",
        "mm-enable-dp-encoder",
        "ple-offload-embedding",
        "speculative-enable-w4a4-mxfp4-megamoe",
    }
)
"""Options with a ``--no-`` form; all other flags are given or left out."""

_EMBEDDING: Final = frozenset({Task.EMBED, Task.CLASSIFY})
_TOKENIZE: Final = frozenset({"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"})
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
    Task.EMBED: frozenset({"/v1/embeddings"}) | _TOKENIZE,
    Task.RERANK: frozenset({"/v1/rerank"}) | _TOKENIZE,
    Task.SCORE: frozenset({"/v1/score"}) | _TOKENIZE,
    Task.CLASSIFY: frozenset({"/v1/classify", "/classify"}) | _TOKENIZE,
    Task.TRANSCRIBE: frozenset({"/v1/audio/transcriptions"}),
}
"""As SGLang's HTTP server has them; it registers all of them for every model."""

# SGLang writes GB and divides by 2**30.
_WEIGHTS: Final = re.compile(r"Load weight end\..*\bmem usage=([\d.]+) GB")
# A draft model's or an auxiliary pool has a label before "KV Cache".
_KV: Final = re.compile(r"(?:^|\] )KV Cache is allocated\..*#tokens: (\d+), (.*)$")
_KV_PART: Final = re.compile(r"(?:K|V|KV) size: ([\d.]+) GB")
_TOTALS: Final = re.compile(r"max_total_num_tokens=(\d+),.*\bcontext_len=(\d+)")


class SGLang(EngineAdapter):
    """SGLang's OpenAI server.

    ``engine.gpuMemoryPercent`` becomes ``--mem-fraction-static``: weights and KV cache have to fit in that
    share, activations and CUDA graphs come on top of it, so it wants to be lower than vLLM's.
    """

    name: ClassVar[str] = "SGLang"
    # /ready is the server's own flag: up, and not on its way out. /health generates a token, which takes a
    # second at least.
    readiness: ClassVar[Probe] = Probe("/ready")
    liveness: ClassVar[Probe] = Probe("/health", timeout_seconds=25)
    load_metrics: ClassVar[LoadMetrics] = LoadMetrics(
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        kv_cache_usage="sglang:token_usage",
    )
    # Waits for the last request without a limit, and looks only every 5 s.
    drain: ClassVar[Drain] = Drain(bounded=False, grace_seconds=75)
    # Only with args {enable-memory-saver: true}.
    sleep: ClassVar[Sleep | None] = Sleep(
        sleep=Call("POST", "/release_memory_occupation", {}),
        wake=Call("POST", "/resume_memory_occupation", {}),
    )
    # A load of what is loaded, or can't be, is answered 400, too.
    adapter_calls: ClassVar[AdapterCalls] = AdapterCalls(
        load="/load_lora_adapter", unload="/unload_lora_adapter", not_loaded=400
    )
    paths: ClassVar[Mapping[Task, frozenset[str]]] = _PATHS

    def problems(self, args: ApplicationArgs, launch: Launch) -> list[SettingsProblem]:
        """Everything that makes this start impossible."""
        settings = args.engine
        # Dropping a default of ours needs no --no- form.
        free = {name: value for name, value in settings.args.items() if canonical(name) != "is-embedding"}
        return [
            *settings_problems(args, launch, self.name),
            *args_problems(free, RESERVED, negatable=NEGATABLE),
            *env_problems(settings.env, OWNED_ENV),
            *one_of("engine.dtype", settings.dtype, DTYPES),
            *one_of("engine.kvCacheDtype", settings.kv_cache_dtype, KV_CACHE_DTYPES),
            *one_of("engine.loadFormat", settings.load_format, LOAD_FORMATS),
            *one_of("engine.quantization", settings.quantization, QUANTIZATIONS),
            *_gaps(args),
        ]

    def read_log(self, line: str, known: EngineMemory) -> EngineMemory:
        """From the lines of the loader, the memory pool and the scheduler."""
        changes: dict[str, Any] = {}
        if match := _WEIGHTS.search(line):
            changes["weights_gib"] = float(match[1])
        if match := _KV.search(line):
            changes["kv_cache_tokens"] = int(match[1])
            changes["kv_cache_gib"] = round(sum(float(size) for size in _KV_PART.findall(match[2])), 2)
        if match := _TOTALS.search(line):
            changes["kv_cache_tokens"] = int(match[1])
            changes["max_model_len"] = int(match[2])
        return msgspec.structs.replace(known, **changes) if changes else known

    def _command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        settings = args.engine
        share = settings.gpu_memory_percent
        typed: dict[str, Any] = {
            "model-path": launch.model,
            **shared_options(args, launch),
            "device": launch.platform.value,
            "enable-metrics": True,
            "context-length": settings.max_model_len,
            "mem-fraction-static": share / 100 if share is not None else None,
            "disable-radix-cache": True if settings.prefix_caching is False else None,
            **_batching(settings),
            "tp-size": settings.tensor_parallel_size,
            "pp-size": settings.pipeline_parallel_size,
            "limit-mm-data-per-request": settings.multimodal_limits or None,
            **_lora(settings.lora),
        }
        # Sequence classifiers are recognised by their architecture; a causal model that embeds is not.
        defaults: dict[str, Any] = {"enable-cache-report": True, "log-level-http": "warning"}
        if args.task in _EMBEDDING:
            defaults["is-embedding"] = True
        free = merge(defaults, settings.args)
        if free.get("is-embedding") is False:
            del free["is-embedding"]
        return [launch.python, "-m", "sglang.launch_server", *render(typed), *render(free)]

    def _environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:  # noqa: ARG002  not by args
        env = shared_environment(launch) | {"SGLANG_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS)}
        if launch.platform is Platform.CPU:
            env["SGLANG_USE_CPU_ENGINE"] = "1"
        return env


def _gaps(args: ApplicationArgs) -> Iterator[SettingsProblem]:
    """What the platform's settings can say and SGLang can't."""
    settings = args.engine
    if settings.kv_cache_memory_bytes is not None and settings.gpu_memory_percent is None:
        yield SettingsProblem(
            "engine.kvCacheMemoryBytes",
            settings.kv_cache_memory_bytes,
            "SGLang takes no size in bytes: set engine.gpuMemoryPercent, or engine.args.max-total-tokens",
        )
    if settings.multimodal_limits and (
        unknown := settings.multimodal_limits.keys() - {"image", "video", "audio"}
    ):
        yield SettingsProblem("engine.multimodalLimits", sorted(unknown), "image, video and audio")


def _batching(settings: EngineSettings) -> dict[str, Any]:
    """SGLang names two sizes: of a chunk, where -1 turns chunking off, and of a whole prefill batch."""
    tokens = settings.max_num_batched_tokens
    chunked = settings.chunked_prefill is not False
    return {
        "max-running-requests": settings.max_num_seqs,
        "chunked-prefill-size": tokens if chunked else -1,
        "max-prefill-tokens": None if chunked else tokens,
    }


def _lora(lora: LoraSettings | None) -> dict[str, Any]:
    if lora is None:
        return {}
    return {
        "enable-lora": True,
        # The base model takes a place in the batch like an adapter.
        "max-loras-per-batch": lora.max_loras + 1,
        "max-lora-rank": lora.max_rank,
        "max-loaded-loras": max(lora.max_cpu_loras, lora.max_loras + 1) if lora.max_cpu_loras else None,
        # Adapters come later, and may touch any.
        "lora-target-modules": ["all"],
    }
