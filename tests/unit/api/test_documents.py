"""Bad input gets every problem at once, each with line, field, value and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfleet_operator.api import (
    InvalidResourcesError,
    ModelDeployment,
    ServingPool,
    duration_seconds,
    parse_object,
    parse_resources,
    quantity_value,
)
from modelfleet_operator.api.base import BYTES, MEMORY, SMALLEST_MEMORY

SAMPLES = sorted(Path("manifests/samples").glob("*.yaml"))

MINIMAL = """
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {name: m}
spec:
  model: {source: "hf://org/name"}
  variants: [{name: bf16}]
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(InvalidResourcesError) as caught:
        parse_resources(text, "f.yaml")
    return [str(p) for p in caught.value.problems]


def spec(**fields: object) -> dict[str, object]:
    base = {"model": {"source": "hf://o/n"}, "variants": [{"name": "a"}, {"name": "b"}]}
    return {
        "apiVersion": "modelfleet.io/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "m"},
        "spec": base | fields,
    }


def test_defaults_are_what_the_schema_says() -> None:
    (deployment,) = parse_resources(MINIMAL, "f.yaml")
    assert isinstance(deployment, ModelDeployment)
    assert deployment.key == "default/m"
    assert deployment.model_name == "m"
    assert deployment.spec.pool == "default"
    assert deployment.spec.routing.affinity == "Prefix"
    assert deployment.spec.variants[0].replicas.min == 1
    assert deployment.spec.variants[0].replicas.upper == 1
    assert deployment.engine(deployment.spec.variants[0]).type == "vLLM"


def test_all_problems_of_all_documents_at_once() -> None:
    text = """apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {name: Foo_bar}
spec:
  model: {source: "hf://a/b", tsk: Generate}
  variants:
  - name: a
    replicas: {min: 3, max: 1}
    quantization: AWK
---
kind: Foo
"""
    found = problems_of(text)
    assert len(found) == 6
    first, second = "document 1 (ModelDeployment Foo_bar)", "document 2 (Foo)"
    assert found[0].startswith(f"f.yaml:3: {first}: metadata.name: 'Foo_bar' is not allowed; must match")
    assert found[1] == f"f.yaml:5: {first}: spec.model.tsk: unknown field; did you mean task?"
    quantization = "spec.variants[0].quantization: 'AWK' is not allowed; use one of 'None', 'FP8'"
    assert found[2].startswith(f"f.yaml:9: {first}: {quantization}")
    assert found[3] == (
        f"f.yaml:8: {first}: spec.variants[0].replicas.min: replicas.min must not exceed replicas.max (is 3)"
    )
    assert found[4].startswith(f"f.yaml:11: {second}: apiVersion: not set is not served here")
    assert found[5].startswith(f"f.yaml:11: {second}: kind: 'Foo' is not a kind of modelfleet.io/v1alpha1")


def test_a_list_as_kubectl_prints_it_is_its_items() -> None:
    item = MINIMAL.replace("{name: m}", "{name: m, namespace: team, resourceVersion: '5', managedFields: []}")
    broken = item.replace("name: m,", "name: second,").replace("hf://org", "ftp://org")
    first, second = ("\n- " + "\n  ".join(text.strip().splitlines()) for text in (item, broken))
    head = "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems:"
    (only,) = parse_resources(head + first, "f.yaml")
    assert only.key == "team/m"
    (problem,) = problems_of(head + first + second)
    assert problem.startswith(
        "f.yaml:15: document 2 (ModelDeployment team/second): spec.model.source: 'ftp://org/name' is"
    )
    assert problems_of("apiVersion: v1\nkind: List\nitems: []") == ["f.yaml: holds no resource"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "f.yaml:1: not valid YAML: while parsing a flow sequence"),
        ("", "f.yaml: holds no resource"),
        ("---\n---\n", "f.yaml: holds no resource"),
        ("- 1", "f.yaml:1: must be an object, not a list"),
        (MINIMAL + "  pool: a\n  pool: b\n", "f.yaml:9: pool: stands twice in one object"),
        (MINIMAL.replace("name: bf16", "name: bf16, engine: {version: 0.33}"), "put it in quotes"),
        (MINIMAL.replace("name: bf16", "name: 16"), "16 is a number; must be a string"),
        (MINIMAL.replace("hf://org/name", "http://x"), "must match"),
        (MINIMAL.replace("name: bf16", "name: bf16, replicas: {min: -1}"), "greater than or equal to 0"),
        (MINIMAL.replace("name: bf16", "name: bf16, replicas: {min: true}"), "valid integer"),
        (MINIMAL.replace("name: m}", "name: " + "m" * 41 + "}"), "at most 40 characters"),
        (MINIMAL.replace("[{name: bf16}]", "[]"), "at least 1 item"),
        (MINIMAL.replace("[{name: bf16}]", "[{name: a}, {name: a}]"), "each variant needs a name of its own"),
        (MINIMAL.replace('{source: "hf://org/name"}', "{}"), "model.source is needed unless every variant"),
    ],
)
def test_each_mistake_is_named(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems_of(text)), problems_of(text)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"routing": {"weights": {"c": 1}}}, "spec.routing.weights", "must name variants"),
        ({"routing": {"weights": {"a": 0, "b": 0}}}, "spec.routing.weights", "above 0"),
        ({"routing": {"fallback": ["c"]}}, "spec.routing.fallback", "must name variants"),
        ({"routing": {"fallback": ["a", "a"]}}, "spec.routing.fallback", "each variant once"),
        ({"routing": {"queue": {"timeout": "5 minutes"}}}, "spec.routing.queue.timeout", "must match"),
        ({"engine": {"gpuMemoryPercent": 90, "kvCacheMemory": "1Gi"}},
         "spec.engine.kvCacheMemory", "exclude"),
        ({"engine": {"env": [{"name": "A B", "value": ""}]}}, "spec.engine.env[0].name", "must match"),
        ({"model": {"source": "hf://o/n", "name": "x"}, "adapters": [{"name": "x", "source": "hf://o/a"}]},
         "spec.adapters", "must not have the name of its model"),
    ],
)  # fmt: skip
def test_cross_field_rules(fields: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(InvalidResourcesError) as caught:
        parse_object(spec(**fields))
    assert any(p.field == field and message in p.message for p in caught.value.problems), str(caught.value)


def test_objects_of_the_api_server_carry_unread_metadata() -> None:
    body = spec()
    body["metadata"] = {"name": "m", "namespace": "team", "managedFields": [{}], "generation": 3, "uid": "u"}
    resource = parse_object(body)
    assert (resource.key, resource.metadata.generation) == ("team/m", 3)


def test_a_pool_is_either_given_or_made() -> None:
    pool = {
        "apiVersion": "modelfleet.io/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": "default"},
        "spec": {"ray": {}, "accelerators": [{"type": "A10"}]},
    }
    with pytest.raises(InvalidResourcesError, match=r"set either ray\.address or ray\.cluster"):
        parse_object(pool)
    pool["spec"] = {"ray": {"address": "http://ray:8265"}, "accelerators": [{"type": "A10"}, {"type": "A10"}]}
    with pytest.raises(InvalidResourcesError, match="each accelerator type stands once"):
        parse_object(pool)
    pool["spec"] = {"ray": {"cluster": {}}, "accelerators": [{"type": "A10", "maxNodes": 3}]}
    parsed = parse_object(pool)
    assert isinstance(parsed, ServingPool)
    assert parsed.spec.ray.cluster is not None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_any_spec_gives_problems_never_a_crash(value: object) -> None:
    body = spec()
    body["spec"] = value
    with pytest.raises(InvalidResourcesError):
        parse_object(body)


def test_units() -> None:
    assert duration_seconds("1h30m") == 5400
    assert duration_seconds("250ms") == 0.25
    assert quantity_value("24Gi") == 24 * 2**30
    assert quantity_value("500m") == 0.5
    assert quantity_value("2") == 2


POOL = """
apiVersion: modelfleet.io/v1alpha1
kind: ServingPool
metadata: {{name: default}}
spec:
  ray: {{cluster: {{head: {{cpu: {cpu}, memory: {memory}}}}}}}
  accelerators: [{{type: A10, cpusPerNode: {cpu}, memoryPerNode: {memory}}}]
"""


@pytest.mark.parametrize(
    ("cpu", "memory", "cores", "size"),
    [
        ("4", "17179869184", 4, 2**34),
        ("'4'", "'17179869184'", 4, 2**34),
        ("7500m", "16Gi", 7.5, 2**34),
        ("1.5", "0.5Gi", None, 2**29),
        ("'1.5'", "1000k", 1.5, 10**6),
    ],
)
def test_quantities_are_written_as_in_kubernetes(
    cpu: str, memory: str, cores: float | None, size: float
) -> None:
    text = POOL.format(cpu=cpu, memory=memory)
    if cores is None:  # Kubernetes takes no fraction for an int-or-string either
        assert any("1.5 is a number; must be a string (put it in quotes)" in p for p in problems_of(text))
        return
    (pool,) = parse_resources(text, "f.yaml")
    assert isinstance(pool, ServingPool)
    (group,) = pool.spec.accelerators
    assert pool.spec.ray.cluster is not None
    for number in (group.cpus_per_node, pool.spec.ray.cluster.head.cpu):
        assert number is not None
        assert quantity_value(number) == cores
    for number in (group.memory_per_node, pool.spec.ray.cluster.head.memory):
        assert number is not None
        assert quantity_value(number) == size


@pytest.mark.parametrize(
    ("cpu", "memory", "problem"),
    [
        ("4", "16", "memoryPerNode must be at least 1M: write a unit, as in 8Gi (is 16)"),
        ("4", "16", "memory must be at least 1M: write a unit, as in 8Gi (is 16)"),
        ("4", "'16'", "memoryPerNode must be at least 1M: write a unit, as in 8Gi (is '16')"),
        ("4", "999k", "must be at least 1M"),
        ("4", "0Gi", "must be at least 1M"),
        ("-4", "16Gi", "cpusPerNode: '-4' is not allowed; must match"),
        ("true", "16Gi", "cpusPerNode: True is a boolean; must be a string"),
        ("4 cores", "16Gi", "'4 cores' is not allowed; must match"),
        ("4", "16GB", "'16GB' is not allowed; must match"),
        ("9" * 33, "16Gi", "at most 32 characters"),
        ("9" * 5000, "16Gi", "f.yaml:2: not valid YAML"),
    ],
)
def test_what_is_no_quantity_is_refused(cpu: str, memory: str, problem: str) -> None:
    found = problems_of(POOL.format(cpu=cpu, memory=memory))
    assert any(problem in one for one in found), found


@given(st.from_regex(MEMORY, fullmatch=True) | st.from_regex(BYTES, fullmatch=True))
def test_the_schema_of_memory_says_what_the_rule_says(text: str) -> None:
    text = text.strip()
    fraction = text.lstrip("0").startswith(".")  # a tiny one is left to the rule
    if re.fullmatch(MEMORY, text) is None:
        assert quantity_value(text) < SMALLEST_MEMORY or fraction
    else:
        assert quantity_value(text) >= SMALLEST_MEMORY or fraction


def test_variants_override_the_engine_field_by_field() -> None:
    engine = {
        "type": "vLLM",
        "maxModelLen": 4096,
        "args": {"a": 1, "b": 1},
        "env": [{"name": "X", "value": "1"}],
    }
    override = {
        "type": "SGLang",
        "args": {"b": 2},
        "env": [{"name": "X", "value": "2"}, {"name": "Y", "value": "3"}],
    }
    deployment = parse_object(
        spec(engine=engine, variants=[{"name": "a", "engine": override}, {"name": "b"}])
    )
    assert isinstance(deployment, ModelDeployment)
    merged = deployment.engine(deployment.spec.variants[0]).settings()
    assert (merged.type, merged.max_model_len) == ("SGLang", 4096)
    assert merged.args == {"a": 1, "b": 2}
    assert merged.env == {"X": "2", "Y": "3"}
    assert deployment.engine(deployment.spec.variants[1]).settings().type == "vLLM"


def test_a_variant_may_size_the_kv_cache_where_the_deployment_gave_a_share() -> None:
    body = spec(engine={"gpuMemoryPercent": 80}, variants=[{"name": "a", "engine": {"kvCacheMemory": "1Gi"}}])
    deployment = parse_object(body)
    assert isinstance(deployment, ModelDeployment)
    settings = deployment.engine(deployment.spec.variants[0]).settings()
    assert (settings.kv_cache_memory_bytes, settings.gpu_memory_percent) == (2**30, None)


def test_adapters_make_room_for_lora() -> None:
    deployment = parse_object(spec(adapters=[{"name": f"a{i}", "source": "hf://o/a"} for i in range(3)]))
    assert isinstance(deployment, ModelDeployment)
    lora = deployment.engine(deployment.spec.variants[0]).settings(adapters=True).lora
    assert lora is not None
    assert (lora.max_loras, lora.max_rank) == (4, 16)


def test_what_a_newer_release_wrote_is_passed_over_after_a_rollback() -> None:
    body = spec(newer={"x": 1}, variants=[{"name": "a", "newer": 1, "replicas": {"min": 2, "newer": 1}}])
    body["status"] = {"ready": "1/1", "newer": 1, "conditions": [{"type": 1}]}
    found = parse_object(body)
    assert isinstance(found, ModelDeployment)
    assert found.spec.variants[0].replicas.min == 2
    assert found.status is None
    body["status"] = {"ready": "1/1", "newer": 1}
    found = parse_object(body)
    assert found.status is not None


def test_a_known_field_with_a_wrong_value_is_refused_beside_unknown_ones() -> None:
    with pytest.raises(InvalidResourcesError, match=r"replicas\.min"):
        parse_object(spec(newer=1, variants=[{"name": "a", "replicas": {"min": -1}}]))


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1",
        "http://:::",
        "http://h:99999",
        "http://h:x",
        "http://u:p@h:1",
        "http://?",
        "http://[v]/",
    ],
)
def test_an_address_that_can_not_be_called_is_refused(address: str) -> None:
    for ray in ({"address": address}, {"address": "http://h:1", "registry": address}):
        with pytest.raises(InvalidResourcesError, match="must be a URL"):
            parse_object(
                {
                    "apiVersion": "modelfleet.io/v1alpha1",
                    "kind": "ServingPool",
                    "metadata": {"name": "p"},
                    "spec": {"ray": ray, "accelerators": [{"type": "A10"}]},
                }
            )
