from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engines import support

from modelfleet_serving import engines
from modelfleet_serving.contract import EngineLoad, EngineMemory, EngineSettings, Task
from modelfleet_serving.engines import EngineSettingsError
from modelfleet_serving.engines.simulator import OPTIONS, RESERVED
from modelfleet_serving.simulator import cli

SIMULATOR = engines.get("Simulator")


def test_engines_are_found_by_the_name_in_the_resource() -> None:
    assert set(engines.REGISTRY) == {"vLLM", "SGLang", "Simulator"}
    assert engines.get("SGLang").name == "SGLang"
    with pytest.raises(engines.UnknownEngineError, match="'vllm' is not one of vLLM, SGLang, Simulator"):
        engines.get("vllm")


@pytest.mark.parametrize("name", sorted(engines.REGISTRY))
def test_an_adapter_refuses_another_engine_s_settings(name: str) -> None:
    args = support.application(EngineSettings(type="Other"))
    with pytest.raises(EngineSettingsError, match="this is the adapter of"):
        engines.get(name).command(args, support.launch())


@pytest.mark.parametrize("name", sorted(engines.REGISTRY))
def test_a_user_s_environment_wins_over_our_defaults(name: str) -> None:
    env = {"HF_HUB_OFFLINE": "0", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    args = support.application(EngineSettings(type=name, env=env))
    assert env.items() <= engines.get(name).environment(args, support.launch()).items()


def test_load_is_summed_over_schedulers_and_the_fullest_cache_counts() -> None:
    text = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:prompt_tokens_total{engine="0",model_name="m"} 12345.0
"""
    assert engines.get("vLLM").read_load(text) == EngineLoad(running=7, waiting=2, kv_cache_usage=0.5)
    assert engines.get("SGLang").read_load(text) == EngineLoad()


def test_text_that_is_no_exposition_is_an_error() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        engines.get("vLLM").read_load("vllm:num_requests_running{} many\n")


STARTS = support.starts(
    support.settings(
        "Simulator",
        {
            "profile": st.sampled_from(("fast", "a10-7b-awq")),
            "output_tokens": st.integers(1, 99),
            "jitter": st.floats(0, 0.5),
            "fault": st.lists(
                st.sampled_from(("errorRate=0.5", "healthHangs=true")), max_size=2, unique=True
            ),
            "max-num-queued-reqs": st.integers(0, 99),
        },
        ("auto",),
        ("awq",),
    )
)


@settings(deadline=None)
@given(STARTS)
def test_the_simulator_parses_whatever_is_rendered(start: tuple) -> None:  # type: ignore[type-arg]
    args, launch = start
    if SIMULATOR.problems(args, launch):
        with pytest.raises(EngineSettingsError):
            SIMULATOR.command(args, launch)
        return
    options = cli.parser().parse_args(SIMULATOR.command(args, launch)[3:])
    assert options.served_model_name == [args.model]
    assert options.task == args.task.value.lower()
    assert options.max_num_seqs == args.engine.max_num_seqs
    assert options.enable_lora == (args.engine.lora is not None)


def test_the_simulator_s_options_are_its_command_line_s() -> None:
    declared = {
        option.removeprefix("--")
        for action in cli.parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert declared >= OPTIONS
    assert RESERVED.keys() <= declared


def test_the_simulator_names_what_it_doesn_t_know() -> None:
    engine = EngineSettings(type="Simulator", args={"enforce-eager": True})
    (problem,) = SIMULATOR.problems(support.application(engine), support.launch())
    assert problem.field == "engine.args.enforce-eager"
    assert "prefill-tokens-per-second" in problem.allowed


def test_the_simulator_transcribes_nothing() -> None:
    assert SIMULATOR.endpoints(Task.TRANSCRIBE) == frozenset()
    args = support.application(EngineSettings(type="Simulator"), task=Task.TRANSCRIBE)
    assert [problem.field for problem in SIMULATOR.problems(args, support.launch())] == ["model.task"]


def test_what_the_simulator_prints_is_read_back() -> None:
    lines = [
        "modelfleet-simulator: Model loading took 1.0 GiB",
        "modelfleet-simulator: Available KV cache memory: 4.0 GiB",
        (
            "modelfleet-simulator: KV cache size: 131,072 tokens, "
            "Maximum concurrency for 32,768 tokens per request: 4.00x"
        ),
    ]
    expected = EngineMemory(weights_gib=1.0, kv_cache_gib=4.0, kv_cache_tokens=131072, max_model_len=32768)
    assert SIMULATOR.read_boot(lines) == expected
