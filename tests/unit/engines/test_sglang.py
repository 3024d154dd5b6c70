from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engines import support

from modelfleet_serving import engines
from modelfleet_serving.contract import (
    ApplicationArgs,
    EngineMemory,
    EngineSettings,
    LoraSettings,
    Task,
)
from modelfleet_serving.engines import EngineSettingsError, Launch, Platform
from modelfleet_serving.engines.sglang import (
    DTYPES,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    NEGATABLE,
    QUANTIZATIONS,
)

SGLANG = engines.get("SGLang")
OPTIONS = support.load("sglang-0.5.23-options.json")
PARSER = support.parser(OPTIONS)
ENGINE = EngineSettings(type="SGLang")

FREE: dict[str, st.SearchStrategy[Any]] = {
    "random-seed": st.integers(0, 9),
    "attention-backend": st.just("triton"),
    "max_queued_requests": st.integers(1, 99),
    "lora-strict-loading": st.booleans(),
    "is-embedding": st.booleans(),
    "enable-memory-saver": st.just(True),
    "sleep-on-idle": st.just(True),
    "json-model-override-args": st.just({"architectures": ["X"]}),
    "preferred-sampling-params": st.just('{"temperature": 0}'),
    "uvicorn-access-log-exclude-prefixes": st.just(["/metrics", "/health"]),
    "schedule-conservativeness": st.floats(0.1, 2),
}
STARTS = support.starts(support.settings("SGLang", FREE, ("auto", "fp8_e5m2"), ("awq", "gptq", "w8a8_int8")))


@settings(deadline=None)
@given(STARTS)
def test_whatever_is_rendered_has_options_that_sglang_declares(start: tuple[ApplicationArgs, Launch]) -> None:
    args, launch = start
    if SGLANG.problems(args, launch):
        with pytest.raises(EngineSettingsError):
            SGLANG.command(args, launch)
        return
    command = SGLANG.command(args, launch)
    assert command[:3] == ["/env/bin/python", "-m", "sglang.launch_server"]
    parsed = PARSER.parse_args(command[3:])
    settings = args.engine
    assert parsed.served_model_name == args.model
    assert parsed.context_length == settings.max_model_len
    assert parsed.max_running_requests == settings.max_num_seqs
    assert parsed.disable_radix_cache == (settings.prefix_caching is False)
    assert (parsed.chunked_prefill_size == -1) == (settings.chunked_prefill is False)
    assert (parsed.tp_size, parsed.pp_size) == (
        settings.tensor_parallel_size,
        settings.pipeline_parallel_size,
    )


def test_a_plain_start() -> None:
    assert SGLANG.command(support.application(ENGINE), support.launch(platform=Platform.CUDA))[3:] == [
        "--model-path=/models/m",
        "--served-model-name=m",
        "--host=127.0.0.1",
        "--port=9000",
        "--device=cuda",
        "--enable-metrics",
        "--tp-size=1",
        "--pp-size=1",
        "--enable-cache-report",
        "--log-level-http=warning",
    ]


def test_prefill_sizes_have_two_names() -> None:
    def sizes(**settings: Any) -> list[str]:
        args = support.application(EngineSettings(type="SGLang", **settings))
        return [item for item in SGLANG.command(args, support.launch()) if "prefill" in item]

    assert sizes(max_num_batched_tokens=4096) == ["--chunked-prefill-size=4096"]
    assert sizes(max_num_batched_tokens=4096, chunked_prefill=True) == ["--chunked-prefill-size=4096"]
    assert sizes(chunked_prefill=True) == []
    assert sizes(max_num_batched_tokens=4096, chunked_prefill=False) == [
        "--chunked-prefill-size=-1",
        "--max-prefill-tokens=4096",
    ]


def test_the_base_model_needs_a_place_among_the_adapters() -> None:
    engine = EngineSettings(type="SGLang", lora=LoraSettings(max_loras=2, max_cpu_loras=2, max_rank=24))
    command = SGLANG.command(support.application(engine), support.launch())
    assert {"--enable-lora", "--max-loras-per-batch=3", "--max-loaded-loras=3", "--max-lora-rank=24"} <= set(
        command
    )
    assert command[command.index("--lora-target-modules") + 1] == "all"


def test_an_embedding_model_is_announced_unless_the_user_objects() -> None:
    def flags(task: Task, **free: Any) -> list[str]:
        args = support.application(EngineSettings(type="SGLang", args=free), task=task)
        return [item for item in SGLANG.command(args, support.launch()) if "embedding" in item]

    assert flags(Task.EMBED) == ["--is-embedding"]
    assert flags(Task.EMBED, **{"is-embedding": False}) == []
    assert flags(Task.GENERATE) == []
    assert flags(Task.RERANK) == []


@pytest.mark.parametrize(
    ("engine", "field", "allowed"),
    [
        ({"kv_cache_memory_bytes": 1 << 30}, "engine.kvCacheMemoryBytes", "engine.gpuMemoryPercent"),
        ({"quantization": "int4"}, "engine.quantization", "one of auto-round"),
        ({"kv_cache_dtype": "fp8"}, "engine.kvCacheDtype", "fp8_e4m3"),
        ({"load_format": "tensorizer"}, "engine.loadFormat", "safetensors"),
        ({"multimodal_limits": {"smell": 1}}, "engine.multimodalLimits", "image, video and audio"),
        ({"args": {"tp-size": 2}}, "engine.args.tp-size", "engine.tensorParallelSize"),
        (
            {"args": {"tensor-parallel-size": 2}},
            "engine.args.tensor-parallel-size",
            "engine.tensorParallelSize",
        ),
        (
            {"args": {"disable-overlap-schedule": False}},
            "engine.args.disable-overlap-schedule",
            "no --no- form",
        ),
    ],
)
def test_what_sglang_can_t_do_is_said(engine: dict[str, Any], field: str, allowed: str) -> None:
    args = support.application(EngineSettings(type="SGLang", **engine))
    problems = [problem for problem in SGLANG.problems(args, support.launch()) if problem.field == field]
    assert len(problems) == 1
    assert allowed in problems[0].allowed


def test_bytes_are_left_to_the_share_where_both_are_given() -> None:
    engine = EngineSettings(type="SGLang", kv_cache_memory_bytes=1, gpu_memory_percent=80)
    assert "--mem-fraction-static=0.8" in SGLANG.command(support.application(engine), support.launch())


def test_our_lists_are_the_sources_own() -> None:
    assert set(OPTIONS["--dtype"]["choices"]) == DTYPES
    assert set(OPTIONS["--kv-cache-dtype"]["choices"]) == KV_CACHE_DTYPES
    assert set(OPTIONS["--load-format"]["choices"]) == LOAD_FORMATS
    assert set(OPTIONS["--quantization"]["choices"]) == QUANTIZATIONS
    flags = {name.removeprefix("--") for name, o in OPTIONS.items() if o.get("action") == "boolean_optional"}
    assert flags == NEGATABLE


def test_reads_the_memory_of_a_boot() -> None:
    assert SGLANG.read_boot(support.lines("sglang-boot.txt")) == EngineMemory(
        weights_gib=14.25, kv_cache_gib=53.14, kv_cache_tokens=995328, max_model_len=32768
    )


def test_reads_an_mla_cache() -> None:
    line = (
        "[2026-11-24 10:00:01] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 1000, KV size: 2.50 GB"
    )
    assert SGLANG.read_boot([line]) == EngineMemory(kv_cache_gib=2.5, kv_cache_tokens=1000)
