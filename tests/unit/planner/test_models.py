"""Facts of the models that people run, from their real configs."""

from __future__ import annotations

import pytest
from tests.unit.planner.measured import Config, all_configs, config

from modelfleet_operator.planner.config import facts_from_config
from modelfleet_operator.planner.facts import AttentionKind
from modelfleet_operator.planner.fields import BrokenConfigError
from modelfleet_operator.planner.kv_cache import kv_layout
from modelfleet_operator.planner.vision import vl2_image_tokens

CONFIGS = all_configs()
VL2 = "deepseek-ai/deepseek-vl2"


@pytest.mark.parametrize("found", [c for c in CONFIGS if c.parameters], ids=lambda c: c.model)
def test_parameters_are_counted_as_published(found: Config) -> None:
    assert found.facts.parameters.total == pytest.approx(found.parameters, rel=1e-3)


@pytest.mark.parametrize(("model", "billions"), [(f"{VL2}-tiny", 3.37), (f"{VL2}-small", 16.1), (VL2, 27.5)])
def test_deepseek_vl2_has_the_sizes_of_its_readme(model: str, billions: float) -> None:
    assert config(model).facts.parameters.total / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("model", "bytes_per_token"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 32 * 2 * 8 * 128 * 2),
        ("Qwen/Qwen2.5-7B-Instruct", 28 * 2 * 4 * 128 * 2),
        ("Qwen/Qwen3-0.6B", 28 * 2 * 8 * 128 * 2),
        (f"{VL2}-tiny", 12 * 2 * 10 * 128 * 2),  # no latent attention in the tiny one
        (f"{VL2}-small", 27 * 576 * 2),
        (VL2, 30 * 576 * 2),
        ("deepseek-ai/DeepSeek-V3", 61 * 576 * 2),
    ],
)
def test_kv_cache_bytes_of_a_token(model: str, bytes_per_token: int) -> None:
    layout = kv_layout(
        config(model).facts,
        block_size=16,
        dtype_bytes=2,
        tensor_parallel=1,
        pipeline_parallel=1,
        in_flight_tokens=0,
    )
    assert layout.request_bytes(1600) == 1600 * bytes_per_token
    assert f"{bytes_per_token:,} B" in layout.explain()


def test_a_latent_is_not_split_and_heads_are_replicated_beyond_their_number() -> None:
    def per_token(model: str, ranks: int) -> float:
        layout = kv_layout(
            config(model).facts, block_size=16, dtype_bytes=2, tensor_parallel=ranks, pipeline_parallel=1,
            in_flight_tokens=0,
        )  # fmt: skip
        return layout.request_bytes(16) / 16

    assert per_token(VL2, 8) == per_token(VL2, 1)
    qwen = "Qwen/Qwen2.5-7B-Instruct"  # 4 KV heads
    assert per_token(qwen, 4) == per_token(qwen, 1) / 4
    assert per_token(qwen, 28) == per_token(qwen, 4)


@pytest.mark.parametrize(("high", "wide", "tokens"), [(1, 1, 421), (3, 3, 2017), (9, 1, 2101), (1, 9, 1989)])
def test_image_tokens_of_deepseek_vl2(high: int, wide: int, tokens: int) -> None:
    assert vl2_image_tokens(high, wide) == tokens


def test_the_largest_image_of_deepseek_vl2() -> None:
    facts = config(f"{VL2}-small").facts
    assert facts.vision is not None
    assert facts.vision.max_item_tokens == 2101
    assert facts.max_context == 4096


@pytest.mark.parametrize(
    ("model", "context"),
    [
        ("deepseek-ai/DeepSeek-V3", 163840),
        ("openai/gpt-oss-20b", 131072),
        ("google/gemma-3-27b-it", 131072),
        ("meta-llama/Llama-3.1-8B-Instruct", 131072),
        ("microsoft/phi-4", 16384),
        ("openai/whisper-large-v3", 448),
        ("BAAI/bge-large-en-v1.5", 512),
    ],
)
def test_context_limits(model: str, context: int) -> None:
    assert config(model).facts.max_context == context


def test_sliding_windows_are_seen() -> None:
    kinds = {a.kind: (a.layers, a.window) for a in config("google/gemma-3-27b-it").facts.attention}
    assert kinds == {AttentionKind.SLIDING: (52, 1024), AttentionKind.FULL: (10, None)}
    kinds = {a.kind: (a.layers, a.window) for a in config("openai/gpt-oss-20b").facts.attention}
    assert kinds == {AttentionKind.SLIDING: (12, 128), AttentionKind.FULL: (12, None)}
    assert [a.kind for a in config("Qwen/Qwen2.5-7B-Instruct").facts.attention] == [AttentionKind.FULL]


def test_encoders_keep_nothing_and_whisper_keeps_its_audio() -> None:
    assert [a.kind for a in config("BAAI/bge-large-en-v1.5").facts.attention] == [AttentionKind.ENCODER]
    assert [a.kind for a in config("openai/whisper-large-v3").facts.attention] == [
        AttentionKind.FULL,
        AttentionKind.CROSS,
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "names no architectures"),
        ({"architectures": ["LlamaForCausalLM"]}, "has no hidden_size"),
        ({"architectures": ["X"], "hidden_size": "big"}, "must be a whole number"),
        ({"architectures": ["X"], "hidden_size": 0}, "must be positive"),
        (
            {"architectures": ["X"], "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
             "vocab_size": 10, "quantization_config": {"bits": 4}},
            "names no quant_method",
        ),
    ],
)  # fmt: skip
def test_a_broken_config_says_what_is_wrong(broken: dict[str, object], message: str) -> None:
    with pytest.raises(BrokenConfigError, match=message):
        facts_from_config(broken)


def test_an_unknown_architecture_is_counted_like_a_llama() -> None:
    known = config("meta-llama/Llama-3.1-8B-Instruct")
    unknown = facts_from_config(
        known.config | {"model_type": "brandnew", "architectures": ["BrandNewForCausalLM"]}
    )
    assert unknown.parameters == known.facts.parameters


def test_an_engine_may_keep_states_in_the_models_own_type() -> None:
    """Granite says nothing of its states, Nemotron-H and Qwen3.5 want 32 bits."""

    def states(model: str) -> tuple[int, int]:
        linear = next(a for a in config(model).facts.attention if a.kind is AttentionKind.LINEAR)
        return linear.state_bytes, linear.narrow_state_bytes

    wide, narrow = states("ibm-granite/granite-4.0-h-tiny")
    assert wide - narrow == 48 * 64 * 128 * 2
    for model in ("nvidia/Nemotron-H-8B-Base-8K", "Qwen/Qwen3.5-9B"):
        wide, narrow = states(model)
        assert wide == narrow
