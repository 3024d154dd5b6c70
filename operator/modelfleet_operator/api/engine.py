"""How an engine is started, as users write it."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from modelfleet_operator.api.base import (
    ApiModel,
    Memory,
    Percent,
    PositiveInt,
    Rule,
    memory_rule,
    quantity_value,
)
from modelfleet_serving.contract import EngineSettings, LoraSettings

EngineType = Literal["vLLM", "SGLang", "Simulator"]
Switch = Literal["Enabled", "Disabled"]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=64)]

LORAS_BY_DEFAULT: Final = 4
LORA_RANK_BY_DEFAULT: Final = 16
"""Before the adapters are known; the plan takes theirs."""
_DTYPES: Final = {"BFloat16": "bfloat16", "Float16": "float16", "Float32": "float32"}
_KV_DTYPES: Final = {"Auto": None, "FP8": "fp8", "FP8E4M3": "fp8_e4m3", "FP8E5M2": "fp8_e5m2"}
_SWITCHES: Final = {"Enabled": True, "Disabled": False}


class EnvVar(ApiModel):
    """An environment variable of the engine. Not for secrets: those belong into the pool's pods."""

    name: EnvName
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=4096)]
    """Value of the variable."""


class LoraSpec(ApiModel):
    """Room for LoRA adapters; set by itself when `spec.adapters` lists any."""

    max_loras: Annotated[int, Field(ge=1, le=256)] | None = None
    """Adapters in one batch. Default: 4."""
    max_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] | None = None
    """Highest rank of an adapter. Default: the highest of `spec.adapters`, at least 16."""
    max_cpu_loras: PositiveInt | None = None
    """Adapters that are kept in host memory."""


class MultimodalSpec(ApiModel):
    """Items that one prompt may hold. 0 turns a modality off and frees its memory."""

    images: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Images in one prompt."""
    videos: Annotated[int, Field(ge=0, le=64)] | None = None
    """Videos in one prompt."""
    audios: Annotated[int, Field(ge=0, le=64)] | None = None
    """Audio clips in one prompt."""

    def limits(self) -> dict[str, int]:
        """Limits by the engines' names of the modalities."""
        named = {"image": self.images, "video": self.videos, "audio": self.audios}
        return {modality: limit for modality, limit in named.items() if limit is not None}


class EngineSpec(ApiModel):
    """An engine and its settings. A variant's `engine` overrides the deployment's, field by field."""

    type: EngineType | None = None
    """Inference engine. Default: vLLM. Simulator needs no GPU and answers with generated words."""
    version: Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9A-Za-z]+)*$", max_length=32)] | None = (
        None
    )
    """Version of the engine. Default: the one that this release was tested with."""
    max_model_len: PositiveInt | None = None
    """Context length in tokens. Default: the longest that fits, up to the model's own."""
    gpu_memory_percent: Percent | None = None
    """Share of the GPU's memory that the engine may take, in percent. Default: the engine's."""
    kv_cache_memory: Memory | None = None
    """Size of the KV cache per GPU, as a quantity such as 8Gi; takes the place of `gpuMemoryPercent`."""
    max_num_seqs: PositiveInt | None = None
    """Requests that run at once; more wait in the engine."""
    chunked_prefill: Switch | None = None
    """Whether long prompts are prefilled in pieces beside running requests."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens in one step: the batch size of chunked prefill."""
    prefix_caching: Switch | None = None
    """Whether the KV cache of common prefixes is kept and shared."""
    dtype: Literal["BFloat16", "Float16", "Float32"] | None = None
    """Data type of activations and unquantized weights. Default: the model's, where the GPU has it."""
    kv_cache_dtype: Literal["Auto", "FP8", "FP8E4M3", "FP8E5M2"] | None = None
    """Data type of the KV cache."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs that share each layer. Default: the fewest that hold the model."""
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """Groups of GPUs that share the layers among them."""
    lora: LoraSpec | None = None
    """Room for LoRA adapters."""
    tool_call_parser: Word | None = None
    """The engine's parser of tool calls, such as hermes; also turns automatic tool choice on."""
    reasoning_parser: Word | None = None
    """The engine's parser of reasoning content, such as qwen3."""
    multimodal: MultimodalSpec | None = None
    """Limits of images, videos and audio in one prompt."""
    trust_remote_code: bool | None = None
    """Whether code in the model's repository may run. Default: false."""
    args: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    """Further command-line options of the engine, without their dashes."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra={"x-map-key": "name"})] | None = None
    """Environment variables of the engine."""

    rules = (
        Rule(
            cel="!(has(self.gpuMemoryPercent) && has(self.kvCacheMemory))",
            message="gpuMemoryPercent and kvCacheMemory exclude each other: set one",
            check=lambda self: self.gpu_memory_percent is None or self.kv_cache_memory is None,
            field="kvCacheMemory",
        ),
        memory_rule("kvCacheMemory", "kv_cache_memory"),
    )

    def over(self, base: EngineSpec | None) -> EngineSpec:
        """This engine's fields, and the base's where this has none; `args` and `env` merge by name."""
        if base is None:
            return self
        chosen: dict[str, Any] = {
            name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None
        }
        if base.args and self.args:
            chosen["args"] = base.args | self.args
        if base.env and self.env:
            chosen["env"] = list({v.name: v for v in [*base.env, *self.env]}.values())
        # The merge of two valid specs may break a rule: the variant's choice wins.
        if self.gpu_memory_percent is not None:
            chosen["kv_cache_memory"] = None
        if self.kv_cache_memory is not None:
            chosen["gpu_memory_percent"] = None
        return base.model_copy(update=chosen)

    def settings(self, *, adapters: bool = False) -> EngineSettings:
        """The settings on the wire, as the user wrote them: what was left open stays open for the plan.

        Args:
            adapters: whether LoRA adapters are served beside the model. How many changes nothing: they come
                and go while the engine runs.
        """
        chosen = {
            "version": self.version,
            "max_model_len": self.max_model_len,
            "gpu_memory_percent": self.gpu_memory_percent,
            "kv_cache_memory_bytes": int(quantity_value(self.kv_cache_memory))
            if self.kv_cache_memory
            else None,
            "max_num_seqs": self.max_num_seqs,
            "chunked_prefill": _SWITCHES[self.chunked_prefill] if self.chunked_prefill else None,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "prefix_caching": _SWITCHES[self.prefix_caching] if self.prefix_caching else None,
            "dtype": _DTYPES[self.dtype] if self.dtype else None,
            "kv_cache_dtype": _KV_DTYPES[self.kv_cache_dtype] if self.kv_cache_dtype else None,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "lora": self._lora_settings(adapters=adapters),
            "tool_call_parser": self.tool_call_parser,
            "reasoning_parser": self.reasoning_parser,
            "multimodal_limits": self.multimodal.limits() if self.multimodal else None,
            "trust_remote_code": self.trust_remote_code,
            "args": self.args,
            "env": {e.name: e.value for e in self.env} if self.env else None,
        }
        return EngineSettings(
            type=self.type or "vLLM",
            **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
        )

    def _lora_settings(self, *, adapters: bool) -> LoraSettings | None:
        if self.lora is None and not adapters:
            return None
        lora = self.lora or LoraSpec()
        return LoraSettings(
            max_loras=lora.max_loras or LORAS_BY_DEFAULT,
            max_rank=lora.max_rank or LORA_RANK_BY_DEFAULT,
            max_cpu_loras=lora.max_cpu_loras,
        )
