"""Configs that are not like most: other names, layers without attention, and nonsense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planner.measured import all_configs

from modelfleet_operator.plan_command import catalogue_view
from modelfleet_operator.planner import AcceleratorPreference as On
from modelfleet_operator.planner import PoolView, VariantRequest, plan_variant
from modelfleet_operator.planner.config import facts_from_config
from modelfleet_operator.planner.facts import AttentionKind
from modelfleet_operator.planner.fields import BrokenConfigError
from modelfleet_serving.contract import EngineSettings

Config = dict[str, Any]
REAL: dict[str, Config] = {each.model: each.config for each in all_configs()}
FULL, LINEAR, SLIDING = AttentionKind.FULL, AttentionKind.LINEAR, AttentionKind.SLIDING

FALCON = {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "vocab_size": 65024,
          "multi_query": True}  # fmt: skip
FAMILIES: dict[str, tuple[Config, float, dict[AttentionKind, tuple[int, int]]]] = {
    "gpt2": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12,
         "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        0.124, {FULL: (12, 12)},
    ),
    "bloom-7b1": (
        {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 4096, "n_layer": 30,
         "num_attention_heads": 32, "vocab_size": 250880, "seq_length": 2048},
        7.07, {FULL: (30, 32)},
    ),
    "falcon-7b": (
        FALCON | {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
                  "num_kv_heads": 71, "new_decoder_architecture": False},
        7.22, {FULL: (32, 1)},
    ),
    "falcon-40b": (
        FALCON | {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60,
                  "num_kv_heads": 8, "new_decoder_architecture": True},
        41.8, {FULL: (60, 8)},
    ),
    "chatglm3-6b": (
        {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": 4096,
         "num_attention_heads": 32, "num_layers": 28, "kv_channels": 128, "multi_query_attention": True,
         "multi_query_group_num": 2, "ffn_hidden_size": 13696, "padded_vocab_size": 65024,
         "seq_length": 8192},
        6.24, {FULL: (28, 2)},
    ),
    "dbrx": (
        {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144, "n_heads": 48,
         "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
         "attn_config": {"kv_n_heads": 8, "clip_qkv": 8},
         "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}},
        131.6, {FULL: (40, 8)},
    ),
    "qwen3-next-80b": (
        {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048,
         "intermediate_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 16,
         "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "num_experts": 512,
         "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
         "full_attention_interval": 4, "max_position_embeddings": 262144},
        79.7, {FULL: (12, 2), LINEAR: (36, 1)},
    ),
    "jamba-mini": (
        {"architectures": ["JambaForCausalLM"], "model_type": "jamba", "hidden_size": 4096,
         "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 2, "expert_layer_offset": 1,
         "expert_layer_period": 2, "attn_layer_offset": 4, "attn_layer_period": 8, "mamba_d_state": 16,
         "vocab_size": 65536, "max_position_embeddings": 262144},
        51.6, {FULL: (4, 8), LINEAR: (28, 1)},
    ),
    "minimax-text-01": (
        {"architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax_text_01",
         "hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 32,
         "num_experts_per_tok": 2, "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10, "vocab_size": 200064},
        456.0, {FULL: (10, 8), LINEAR: (70, 1)},
    ),
}  # fmt: skip
"""Config, published number of parameters in billions, and layers and KV heads by kind of attention."""


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_names_of_their_own(name: str) -> None:
    config, billions, layouts = FAMILIES[name]
    facts = facts_from_config(config)
    assert facts.parameters.total / 1e9 == pytest.approx(billions, rel=0.04)
    assert {a.kind: (a.layers, a.kv_heads) for a in facts.attention} == layouts
    assert bool(facts.approximate) == (LINEAR in layouts)


def test_layers_that_keep_nothing_take_no_cache() -> None:
    config = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hidden_size": 4096,
              "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "hybrid_override_pattern": "M-M*-M", "mamba_num_heads": 128, "mamba_head_dim": 64,
              "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "vocab_size": 131072}  # fmt: skip
    linear, full = sorted(facts_from_config(config).attention, key=lambda a: a.kind is FULL)
    assert (linear.layers, full.layers) == (3, 1)
    inner, state = 128 * 64, 128
    assert linear.state_bytes == inner * state * 4 + 3 * (inner + 2 * 8 * state) * 2
    with pytest.raises(BrokenConfigError, match=r"unknown letters: \?"):
        facts_from_config(config | {"hybrid_override_pattern": "M?"})


def test_a_model_without_attention_is_planned() -> None:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 2560,
              "num_hidden_layers": 64, "vocab_size": 50280, "state_size": 16, "conv_kernel": 4,
              "expand": 2, "intermediate_size": 5120}  # fmt: skip
    facts = facts_from_config(config)
    assert [(a.kind, a.layers) for a in facts.attention] == [(LINEAR, 64)]
    result = plan_variant(VariantRequest(facts), catalogue_view())
    assert result.plan is not None
    assert any("rough estimate" in note for note in result.plan.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"num_hidden_layers": 10**30}, "whole number"),
        ({"vocab_size": float("inf")}, "whole number"),
        ({"vocab_size": float("nan")}, "whole number"),
        ({"head_dim": -1}, "do not share"),
        ({"num_attention_heads": 8192}, "do not share"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2}}, "makes no sense"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": ["x", {}]}}, "makes no sense"),
    ],
)
def test_nonsense_is_called_so(change: Config, message: str) -> None:
    with pytest.raises(BrokenConfigError, match=message):
        facts_from_config(REAL["meta-llama/Llama-3.1-8B-Instruct"] | change)


ODD = st.sampled_from(
    [None, 0, -1, 1, 3, "x", "", 1.5, [], {}, 2**62, 10**30, True, ["a"], {"a": 1}, [None], [[1]], "128",
     float("inf"), float("nan")]
)  # fmt: skip
POOL = PoolView(tuple(g for g in catalogue_view().groups if g.accelerator in {"T4", "A100-80G", "CPU"}))


@given(st.sampled_from(sorted(REAL)), st.data())
@settings(max_examples=150)
def test_any_config_is_planned_or_called_broken(model: str, data: st.DataObject) -> None:
    config = copy.deepcopy(REAL[model])
    for _ in range(2):
        places = list(_places(config))
        holder, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
        holder[key] = copy.deepcopy(data.draw(ODD))
    try:
        facts = facts_from_config(config)
    except BrokenConfigError:
        return
    for group in POOL.groups:
        request = VariantRequest(
            facts,
            engine=EngineSettings(type="vLLM"),
            accelerators=(On(group.accelerator),),
        )
        assert plan_variant(request, POOL).reason != "PlannerFailed"


def _places(node: Any) -> Any:
    """Every holder and key of a config."""
    entries = node.items() if isinstance(node, dict) else enumerate(node[:3])
    for key, value in list(entries):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)
