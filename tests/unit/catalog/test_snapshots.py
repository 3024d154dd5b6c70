"""The legality table against the engines' own sources: as snapshots, and as installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from modelfleet_operator.catalog.legality import EngineRules, Snapshot, capability, engine_rules, snapshots
from modelfleet_serving import environments

WALK = Path(__file__).with_name("walk_vllm.py")

# What each checkpoint method is run as, where there is but one way.
SCHEMES_OF_METHOD = {
    "vLLM": {
        "awq": ["w4a16"], "awq_marlin": ["w4a16"], "gptq": ["w4a16", "w8a16"], "gptq_marlin": ["w4a16"],
        "fp8": ["w8a8-fp8", "w8a8-fp8-block"], "mxfp4": ["mxfp4a16"], "modelopt_fp4": ["nvfp4"],
        "compressed-tensors": ["w4a16", "w8a16", "w8a8-int8", "w8a8-fp8", "w8a16-fp8", "w4a8-fp8"],
        "bitsandbytes": ["w4a16-bnb", "w8a16-bnb"], "mxfp8": ["mxfp8"],
    },
    "SGLang": {
        "awq_marlin": ["w4a16"], "gptq_marlin": ["w4a16"], "fp8": ["w8a8-fp8", "w8a8-fp8-block"],
        "mxfp4": ["mxfp4a16"], "compressed-tensors": ["w4a16", "w8a8-int8", "w8a8-fp8", "w8a16-fp8"],
        "bitsandbytes": ["w4a16-bnb"], "modelopt_fp4": ["nvfp4"],
    },
}  # fmt: skip


def rules_of(found: Snapshot) -> EngineRules:
    rules = engine_rules(found.engine)
    assert rules is not None
    return rules


@pytest.mark.parametrize("found", snapshots(), ids=lambda s: f"{s.engine}-{s.version}")
def test_no_scheme_starts_below_its_methods_gate(found: Snapshot) -> None:
    rules = rules_of(found)
    for method, schemes in SCHEMES_OF_METHOD[found.engine].items():
        gate = found.methods.get(method)
        if gate is None:
            continue
        for scheme in schemes:
            lowest = min(step.floor for step in rules.schemes[scheme] if step.floor is not None)
            assert lowest >= max(gate.min_capability, rules.floor) or gate.min_capability < rules.floor, (
                f"{found.version}: {scheme} from {lowest}, {method} wants {gate.min_capability}"
            )


@pytest.mark.parametrize("found", snapshots(), ids=lambda s: f"{s.engine}-{s.version}")
def test_load_time_methods_exist(found: Snapshot) -> None:
    if found.engine != "vLLM":
        return
    assert rules_of(found).load_time["FP8"].method in found.methods


def test_facts_that_decide_about_old_gpus() -> None:
    """Where an engine's next version changes one of these, the table must be looked at again."""
    vllm = {s.version: s for s in snapshots() if s.engine == "vLLM"}["0.33.0"]
    expected = {
        "fp8": "7.5",
        "awq": "7.5",
        "mxfp4": "8.0",
        "modelopt_fp4": "7.5",
        "gptq": "6.0",
        "compressed-tensors": "7.0",
    }
    assert {name: vllm.methods[name].min_capability for name in expected} == {
        name: capability(text) for name, text in expected.items()
    }
    assert vllm.methods["mxfp4"].dtypes == {"bfloat16"}
    assert "bitsandbytes" not in vllm.methods
    assert "gguf" not in vllm.methods
    assert "lora" not in vllm.architectures["DeepseekVLV2ForCausalLM"]
    assert "lora" in vllm.architectures["DeepseekOCRForCausalLM"]


@pytest.mark.engine
def test_the_installed_vllm_says_the_same() -> None:
    """Walks every quantization config of the installed engine: minimum capability and activation dtypes."""
    try:
        python = environments.resolve("vLLM").python
    except environments.EngineNotInstalledError as missing:
        print(missing)
        pytest.skip(str(missing))
    run = subprocess.run([python, WALK], capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    walked = json.loads(run.stdout.splitlines()[-1])
    known = {s.version: s for s in snapshots() if s.engine == "vLLM"}
    assert walked["version"] in known, (
        f"no snapshot of vLLM {walked['version']}: run scripts/extract_engine_facts.py"
    )
    methods = known[walked["version"]].methods
    compared = 0
    for name, (minimum, dtypes) in walked["methods"].items():
        if name not in methods:
            continue  # shorthands for methods that the engine applies at load
        compared += 1
        assert methods[name].min_capability == tuple(divmod(minimum, 10)), name
        if dtypes is not None:
            assert methods[name].dtypes == set(dtypes), name
    assert compared == len(methods)
