"""The catalogue is data: what it must hold together."""

from __future__ import annotations

import pytest

from modelfleet_operator.catalog.accelerators import accelerator, accelerators, by_product_label
from modelfleet_operator.catalog.engines import default_version, engine_defaults, version_key
from modelfleet_operator.catalog.legality import engine_rules, snapshot, snapshots


def test_the_accelerators_that_people_have_are_known() -> None:
    names = {
        "T4",
        "A10",
        "A10G",
        "L4",
        "L40S",
        "A100-40G",
        "A100-80G",
        "H100",
        "H200",
        "B200",
        "CPU",
        "Ascend-910B",
    }
    assert names <= accelerators().keys()


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Tesla-T4", "T4"),
        ("NVIDIA-A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "A100-40G-MIG-1g.5gb"),
    ],
)
def test_nodes_are_known_by_their_product_label(label: str, name: str) -> None:
    found = by_product_label(label)
    assert found is not None
    assert found.name == name


def test_no_two_accelerators_share_a_product_label() -> None:
    labels = [label for kind in accelerators().values() for label in kind.product_labels]
    assert len(labels) == len(set(labels))


def test_slices_have_resources_of_their_own() -> None:
    for kind in accelerators().values():
        if kind.slice:
            assert kind.resource is not None
            assert kind.resource.startswith("nvidia.com/mig-")


def test_capabilities_and_dtypes_agree() -> None:
    for kind in accelerators().values():
        if kind.compute_capability is not None:
            assert ("bfloat16" in kind.dtypes) == (kind.compute_capability >= (8, 0)), kind.name


@pytest.mark.parametrize(
    ("where", "tokens", "sequences"),
    [
        ("T4", 2048, 256),
        ("A10", 2048, 256),
        ("A100-80G", 2048, 256),
        ("H100", 8192, 1024),
        ("B200", 16384, 1024),
    ],
)
def test_vllm_batches_by_memory_but_not_on_an_a100(where: str, tokens: int, sequences: int) -> None:
    kind, defaults = accelerator(where), engine_defaults("vLLM")
    assert kind is not None
    assert defaults is not None
    batch = defaults.batch_for(kind)
    assert (batch.tokens, batch.sequences) == (tokens, sequences)


def test_versions_are_ordered_by_their_numbers() -> None:
    assert version_key("0.9.2") < version_key("0.33.0") < version_key("1.0")
    assert version_key("0.5.10rc1") == (0, 5, 10)


def test_defaults_hold_from_a_version_on() -> None:
    old, new = engine_defaults("vLLM", "0.26.0"), engine_defaults("vLLM", "0.33.0")
    assert old is not None
    assert new is not None
    assert (old.runner_v2, new.runner_v2) == ("dense", "all")
    assert engine_defaults("Simulator") is None


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_the_default_version_has_rules_and_a_snapshot(engine: str) -> None:
    version = default_version(engine)
    assert version is not None
    assert engine_rules(engine) is not None
    found = snapshot(engine, version)
    assert found is not None
    assert found.version == version


def test_schemes_never_promise_less_than_the_engines_floor() -> None:
    for engine in ("vLLM", "SGLang"):
        rules = engine_rules(engine)
        assert rules is not None
        for name, steps in rules.schemes.items():
            floors = [step.floor for step in steps if step.floor is not None]
            assert all(floor >= rules.floor for floor in floors), (engine, name)
            assert floors == sorted(floors, reverse=True), (
                f"{engine} {name}: the first step that holds is taken"
            )


def test_snapshots_hold_what_legality_asks_for() -> None:
    for found in snapshots():
        assert len(found.methods) > 15, found.version
        assert "LlamaForCausalLM" in found.architectures
        for name in ("fp8", "awq", "compressed-tensors"):
            assert name in found.methods, (found.engine, found.version, name)
