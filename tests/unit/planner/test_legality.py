"""What runs where, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.planner.measured import config

from modelfleet_operator.catalog.accelerators import accelerator
from modelfleet_operator.planner import Rejection, VariantRequest
from modelfleet_operator.planner.facts import CheckpointQuantization, ModelFacts
from modelfleet_operator.planner.legality import Verdict, judge
from modelfleet_operator.planner.types import Rule
from modelfleet_serving.contract import EngineSettings

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def ask(
    model: str | ModelFacts,
    where: str,
    quantization: str = "None",
    engine: str = "vLLM",
    adapters: int = 0,
    **settings: object,
) -> Verdict | Rejection:
    facts = config(model).facts if isinstance(model, str) else model
    kind = accelerator(where)
    assert kind is not None
    request = VariantRequest(facts, quantization, EngineSettings(type=engine, **settings), adapters=adapters)  # type: ignore[arg-type]
    return judge(request, facts, kind)


def runs(verdict: Verdict | Rejection) -> Verdict:
    assert isinstance(verdict, Verdict), verdict
    return verdict


def refused(verdict: Verdict | Rejection, rule: Rule, *words: str) -> None:
    assert isinstance(verdict, Rejection), verdict
    assert verdict.rule is rule
    for word in words:
        assert word in verdict.message
    assert verdict.source, "every verdict names its source"


def test_bf16_becomes_fp16_on_a_t4_and_says_so() -> None:
    verdict = runs(ask(LLAMA, "T4"))
    assert verdict.dtype == "float16"
    assert any("no bfloat16" in note for note in verdict.notes)
    assert runs(ask(LLAMA, "A10")).dtype == "bfloat16"


def test_bf16_on_a_t4_is_refused_where_it_is_asked_for_or_the_model_needs_it() -> None:
    refused(ask(LLAMA, "T4", dtype="bfloat16"), Rule.DTYPE_NOT_SUPPORTED, "T4", "bfloat16")
    refused(ask("google/gemma-3-27b-it", "T4"), Rule.DTYPE_NOT_SUPPORTED, "gemma3", "float16")


def test_float32_checkpoints_run_in_16_bits() -> None:
    assert runs(ask("BAAI/bge-large-en-v1.5", "A10")).dtype == "bfloat16"
    assert runs(ask("BAAI/bge-large-en-v1.5", "T4")).dtype == "float16"


@pytest.mark.parametrize(
    ("where", "compute"),
    [
        ("T4", "W8A16 (Marlin)"),
        ("A10", "W8A16 (Marlin)"),
        ("A100-80G", "W8A16 (Marlin)"),
        ("L4", "W8A8 FP8"),
        ("H100", "W8A8 FP8"),
    ],
)
def test_fp8_weights_run_as_w8a16_below_8_9(where: str, compute: str) -> None:
    verdict = runs(ask(LLAMA, where, "FP8"))
    assert verdict.scheme.compute == compute
    assert verdict.quantize_at_load == "fp8"
    assert any("8.9" in note for note in verdict.notes) == (compute != "W8A8 FP8")


def test_sglang_needs_8_0() -> None:
    refused(ask(LLAMA, "T4", engine="SGLang"), Rule.COMPUTE_CAPABILITY, "8.0", "7.5")
    runs(ask(LLAMA, "A10", engine="SGLang"))
    refused(ask(LLAMA, "CPU", engine="SGLang"), Rule.ENGINE_NOT_SUPPORTED, "CPU")


def test_latent_attention_needs_8_0() -> None:
    refused(ask("deepseek-ai/deepseek-vl2-small", "T4"), Rule.ATTENTION_NOT_SUPPORTED, "8.0")
    runs(ask("deepseek-ai/deepseek-vl2-tiny", "T4"))
    runs(ask("deepseek-ai/deepseek-vl2-small", "A10"))


def test_mxfp4_needs_8_0_and_bf16() -> None:
    refused(ask("openai/gpt-oss-20b", "T4", "MXFP4"), Rule.COMPUTE_CAPABILITY, "8.0", "7.5")
    verdict = runs(ask("openai/gpt-oss-20b", "A10", "MXFP4"))
    assert verdict.scheme.experts_only
    refused(ask("openai/gpt-oss-20b", "A10", "MXFP4", dtype="float16"), Rule.DTYPE_NOT_SUPPORTED, "bfloat16")


def test_awq_runs_from_7_5_on_and_on_cpus() -> None:
    for where in ("T4", "A10", "A100-40G", "H100", "CPU"):
        assert "W4A16" in runs(ask("Qwen/Qwen2.5-7B-Instruct-AWQ", where, "AWQ")).scheme.compute
    refused(ask("Qwen/Qwen2.5-7B-Instruct-AWQ", "V100-16G", "AWQ"), Rule.COMPUTE_CAPABILITY, "7.5", "7.0")


def test_plugins_are_named() -> None:
    facts = replace(config(LLAMA).facts, quantization=CheckpointQuantization("bitsandbytes", "w4a16-bnb", 4))
    refused(ask(facts, "A10", "BitsAndBytes"), Rule.QUANTIZATION_NOT_SUPPORTED, "plugin")
    runs(ask(facts, "A10", "BitsAndBytes", version="0.26.0"))
    runs(ask(facts, "A10", "BitsAndBytes", engine="SGLang"))


def test_plugins_are_named_for_unquantized_checkpoints_too() -> None:
    for declared in ("BitsAndBytes", "GGUF"):
        refused(ask(LLAMA, "A10", declared), Rule.QUANTIZATION_NOT_SUPPORTED, "plugin")
    assert runs(ask(LLAMA, "A10", "BitsAndBytes", version="0.26.0")).quantize_at_load == "bitsandbytes"
    assert runs(ask(LLAMA, "A10", "BitsAndBytes", engine="SGLang")).quantize_at_load == "bitsandbytes"


def test_fp8_kv_cache() -> None:
    refused(ask(LLAMA, "T4", kv_cache_dtype="fp8"), Rule.KV_CACHE_DTYPE_NOT_SUPPORTED, "8.9")
    assert runs(ask(LLAMA, "H100", kv_cache_dtype="fp8")).kv_dtype_bytes == 1
    assert any("FlashInfer" in note for note in runs(ask(LLAMA, "A10", kv_cache_dtype="fp8")).notes)
    refused(ask(LLAMA, "CPU", kv_cache_dtype="fp8"), Rule.KV_CACHE_DTYPE_NOT_SUPPORTED)


def test_adapters_and_pipelines_where_the_architecture_has_them() -> None:
    refused(ask("deepseek-ai/deepseek-vl2-small", "H100", adapters=1), Rule.ADAPTERS_NOT_SUPPORTED, "LoRA")
    runs(ask(LLAMA, "H100", adapters=1))
    runs(ask("deepseek-ai/deepseek-vl2-small", "H100", pipeline_parallel_size=2))


@pytest.mark.parametrize(
    ("model", "declared", "words"),
    [
        (LLAMA, "AWQ", ("not quantized", "AWQ")),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "None", ("declared None", "AWQ")),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "GPTQ", ("declared GPTQ", "AWQ")),
        ("Qwen/Qwen3-30B-A3B-FP8", "INT8", ("declared INT8", "FP8")),
    ],
)
def test_a_declaration_that_the_checkpoint_contradicts(
    model: str, declared: str, words: tuple[str, ...]
) -> None:
    refused(ask(model, "H100", declared), Rule.QUANTIZATION_MISMATCH, *words)


def test_compressed_tensors_is_known_by_its_scheme_too() -> None:
    for declared in ("INT8", "CompressedTensors"):
        assert runs(ask("meta-llama/Llama-3.1-8B-W8A8", "T4", declared)).scheme.compute == "W8A8 INT8"


def test_int8_at_load_came_with_a_version() -> None:
    assert runs(ask(LLAMA, "A10", "INT8")).quantize_at_load == "int8_per_channel_weight_only"
    refused(ask(LLAMA, "A10", "INT8", version="0.26.0"), Rule.QUANTIZATION_MISMATCH, "0.26.0")


def test_accelerators_without_an_engine() -> None:
    refused(ask(LLAMA, "Ascend-910B"), Rule.ENGINE_NOT_SUPPORTED, "Huawei")


def test_a_context_beyond_the_models_own() -> None:
    refused(
        ask("deepseek-ai/deepseek-vl2-small", "H100", max_model_len=8192),
        Rule.CONTEXT_TOO_LONG,
        "8,192",
        "4,096",
    )
    runs(ask("Qwen/Qwen2.5-7B-Instruct", "H100", max_model_len=65536, args={"hf-overrides": {}}))
