"""The CRDs at the real API server: rules with an accept and a reject, defaults, columns, documentation."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tests.controlplane.bed import Cluster, CommandError
from tests.controlplane.operator.world import GROUP, deployment

from modelfleet_operator.api import InvalidResourcesError, parse_object
from modelfleet_operator.api.base import ApiModel, Rule

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]

Body = dict[str, Any]


def pool(name: str = "p", **spec: Any) -> Body:
    base: Body = {"ray": {"address": "http://r:8265"}, "accelerators": [{"type": "A10", "maxNodes": 2}]}
    return {"apiVersion": GROUP, "kind": "ServingPool", "metadata": {"name": name}, "spec": base | spec}


def variants(*names: str, **fields: Any) -> list[Body]:
    return [{"name": name, **fields} for name in names or ("a", "b")]


ADAPTER = {"name": "lora", "source": "hf://o/lora"}
LONG = "n" * 41
CASES: dict[str, tuple[Body, Body]] = {
    "replicas.min must not exceed replicas.max": (
        deployment(variants=variants(replicas={"min": 2, "max": 2})),
        deployment(variants=variants(replicas={"min": 3, "max": 2})),
    ),
    "routing.weights must give at least one variant a weight above 0": (
        deployment(routing={"weights": {"a": 0, "b": 1}}),
        deployment(routing={"weights": {"a": 0, "b": 0}}),
    ),
    "routing.fallback must name each variant once": (
        deployment(routing={"fallback": ["a", "b"]}),
        deployment(routing={"fallback": ["a", "a"]}),
    ),
    "model.source is needed unless every variant has a source of its own": (
        deployment(model={}, variants=variants(source="hf://o/n")),
        deployment(model={}, variants=[*variants("a", source="hf://o/n"), *variants("b")]),
    ),
    "routing.weights must name variants of this deployment": (
        deployment(routing={"weights": {"b": 1}}),
        deployment(routing={"weights": {"c": 1}}),
    ),
    "routing.fallback must name variants of this deployment": (
        deployment(routing={"fallback": ["b"]}),
        deployment(routing={"fallback": ["c"]}),
    ),
    "an adapter must not have the name of its model": (
        deployment(model={"name": "base", "source": "hf://o/n"}, adapters=[ADAPTER]),
        deployment(model={"name": "lora", "source": "hf://o/n"}, adapters=[ADAPTER]),
    ),
    "gpuMemoryPercent and kvCacheMemory exclude each other: set one": (
        deployment(engine={"gpuMemoryPercent": 80}),
        deployment(engine={"gpuMemoryPercent": 80, "kvCacheMemory": "4Gi"}),
    ),
    "minNodes must not exceed maxNodes": (
        pool(accelerators=[{"type": "A10", "minNodes": 1, "maxNodes": 1}]),
        pool(accelerators=[{"type": "A10", "minNodes": 2, "maxNodes": 1}]),
    ),
    "set either ray.address or ray.cluster": (
        pool(ray={"cluster": {}}),
        pool(ray={"cluster": {}, "address": "http://r:8265"}),
    ),
    "ray.registry and ray.authToken go with ray.address": (
        pool(ray={"address": "http://r:8265", "authToken": {"name": "s", "key": "k"}}),
        pool(ray={"cluster": {}, "authToken": {"name": "s", "key": "k"}}),
    ),
    "ray.address must be a URL with a host, without a user: http://ray-head:8265": (
        pool(ray={"address": "https://[::1]:8265/ray"}),
        pool(ray={"address": "http://user:password@ray:8265"}),
    ),
    "ray.registry must be a URL with a host, without a user: http://ray-head:8265": (
        pool(ray={"address": "http://r:8265", "registry": "http://r"}),
        pool(ray={"address": "http://r:8265", "registry": "http://[::1"}),
    ),
    "an adapter must not have the name of its model, here the resource's": (
        deployment(adapters=[ADAPTER]),
        deployment("lora", adapters=[ADAPTER]),
    ),
    "metadata.name must have at most 40 characters": (deployment(LONG[:40]), deployment(LONG)),
}
IN_SCHEMA: dict[str, tuple[Body, str]] = {
    "each variant needs a name of its own": (deployment(variants=variants("a", "a")), "Duplicate value"),
    "each adapter needs a name of its own": (deployment(adapters=[ADAPTER, ADAPTER]), "Duplicate value"),
    "each accelerator type stands once": (
        pool(accelerators=[{"type": "A10"}, {"type": "A10"}]),
        "Duplicate value",
    ),
    "kvCacheMemory must be at least 1M: write a unit, as in 8Gi": (
        deployment(engine={"kvCacheMemory": 8}),
        "spec.engine.kvCacheMemory: .*greater than or equal to",
    ),
    "memoryPerNode must be at least 1M: write a unit, as in 8Gi": (
        pool(accelerators=[{"type": "A10", "memoryPerNode": "64"}]),
        "memoryPerNode: Invalid value: .*should match",
    ),
    "memory must be at least 1M: write a unit, as in 8Gi": (
        pool(ray={"cluster": {"head": {"memory": 999_999}}}),
        "spec.ray.cluster.head.memory: .*greater than or equal to",
    ),
}
ON_UPDATE = "model.name can't be changed: clients ask for it; make a new ModelDeployment"


def all_rules() -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    stack: list[type[ApiModel]] = [ApiModel]
    while stack:
        kind = stack.pop()
        stack += kind.__subclasses__()
        found |= {
            rule.message: rule for rule in kind.rules if kind.__module__.startswith("modelfleet_operator")
        }
    return found


def create(cluster: Cluster, namespace: str, body: Body) -> None:
    cluster.kubectl("create", "--dry-run=server", "-n", namespace, "-f", "-", input=json.dumps(body))


def test_every_rule_has_a_case() -> None:
    assert all_rules().keys() == CASES.keys() | IN_SCHEMA.keys() | {ON_UPDATE}


@pytest.mark.parametrize("message", CASES)
def test_rule(crds: Cluster, namespace: str, message: str) -> None:
    good, bad = CASES[message]
    create(crds, namespace, good)
    with pytest.raises(CommandError) as refused:
        create(crds, namespace, bad)
    assert message in refused.value.stderr


@pytest.mark.parametrize("message", IN_SCHEMA)
def test_rule_in_the_schema(crds: Cluster, namespace: str, message: str) -> None:
    body, refusal = IN_SCHEMA[message]
    with pytest.raises(CommandError, match=refusal):
        create(crds, namespace, body)


def test_long_pool_name(crds: Cluster, namespace: str) -> None:
    create(crds, namespace, pool(LONG[:40]))
    with pytest.raises(CommandError, match="at most 40 characters"):
        create(crds, namespace, pool(LONG))


def test_model_name_can_not_be_changed(crds: Cluster, namespace: str) -> None:
    crds.apply(deployment(model={"name": "one", "source": "hf://o/n"}), namespace=namespace)
    crds.apply(deployment(model={"name": "one", "source": "hf://o/other"}), namespace=namespace)
    for model in ({"name": "two", "source": "hf://o/n"}, {"source": "hf://o/n"}):
        with pytest.raises(CommandError) as refused:
            crds.apply(deployment(model=model), namespace=namespace)
        assert ON_UPDATE in refused.value.stderr


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.variants.0.quantization", "FP7"),
        ("spec.variants.0.replicas.min", -1),
        ("spec.variants.0.name", "Not_A_Label"),
        ("spec.model.source", "ftp://o/n"),
        ("spec.engine.type", "TGI"),
        ("spec.engine.gpuMemoryPercent", 0),
        ("spec.routing.queue.timeout", "soon"),
        ("spec.rollout.strategy", "BlueGreen"),
    ],
)
def test_wrong_values_are_refused(crds: Cluster, namespace: str, path: str, value: object) -> None:
    body = copy.deepcopy(deployment())
    node: Any = body
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = value
    with pytest.raises(CommandError) as refused:
        create(crds, namespace, body)
    assert last in refused.value.stderr


QUANTITIES = [4, "4", "7500m", "1.5"]
NO_QUANTITIES = [-1, 1.5, True, "4 cores", "1e3", "", "1" * 33]
MEMORY = ["16Gi", 17179869184, "17179869184", "0.5Gi", "1000k", 1_000_000, "1Mi"]
NO_MEMORY = [0, 999_999, "16", "0Gi", "999k", "16GB", "1000m", 1.5]


@pytest.mark.parametrize("value", QUANTITIES)
def test_quantity(crds: Cluster, namespace: str, value: object) -> None:
    create(crds, namespace, pool(accelerators=[{"type": "A10", "cpusPerNode": value}]))
    create(crds, namespace, pool(ray={"cluster": {"head": {"cpu": value}}}))


@pytest.mark.parametrize("value", NO_QUANTITIES)
def test_no_quantity(crds: Cluster, namespace: str, value: object) -> None:
    with pytest.raises(CommandError, match="cpusPerNode"):
        create(crds, namespace, pool(accelerators=[{"type": "A10", "cpusPerNode": value}]))


@pytest.mark.parametrize("value", MEMORY)
def test_memory(crds: Cluster, namespace: str, value: object) -> None:
    create(crds, namespace, pool(accelerators=[{"type": "A10", "memoryPerNode": value}]))
    create(crds, namespace, pool(ray={"cluster": {"head": {"memory": value}}}))
    create(crds, namespace, deployment(engine={"kvCacheMemory": value}))


@pytest.mark.parametrize("value", NO_MEMORY)
def test_no_memory(crds: Cluster, namespace: str, value: object) -> None:
    with pytest.raises(CommandError, match="kvCacheMemory"):
        create(crds, namespace, deployment(engine={"kvCacheMemory": value}))


@pytest.mark.parametrize(
    ("kind", "values", "accepted"),
    [
        ("cpu", QUANTITIES, True),
        ("cpu", NO_QUANTITIES, False),
        ("memory", MEMORY, True),
        ("memory", NO_MEMORY, False),
    ],
)
def test_files_take_the_same_quantities(kind: str, values: list[object], accepted: bool) -> None:
    for value in values:
        body = pool(ray={"cluster": {"head": {kind: value}}})
        if accepted:
            parse_object(body)
        else:
            with pytest.raises(InvalidResourcesError):
                parse_object(body)


def test_unknown_fields_are_told(crds: Cluster, namespace: str) -> None:
    with pytest.raises(CommandError, match="unknown field"):
        create(crds, namespace, deployment(varaints=[]))


def test_defaults(crds: Cluster, namespace: str) -> None:
    crds.apply(deployment(), namespace=namespace)
    spec = crds.get("mdep", "m", namespace)["spec"]
    assert spec["pool"] == "default"
    assert spec["variants"][0]["replicas"] == {"min": 1}
    assert spec["routing"]["queue"] == {"maxRequests": 1024, "timeout": "300s"}
    assert spec["rollout"] == {"strategy": "Auto", "drainTimeout": "600s"}
    crds.apply(pool(ray={"cluster": {}}), namespace=namespace)
    assert crds.get("spool", "p", namespace)["spec"]["ray"]["cluster"]["head"] == {
        "cpu": "2", "memory": "8Gi", "nodeSelector": {}, "tolerations": [],
    }  # fmt: skip


def test_columns_short_names_and_category(crds: Cluster, namespace: str) -> None:
    crds.apply(deployment(), pool(), namespace=namespace)
    header = crds.kubectl("get", "mdep", "-n", namespace).splitlines()[0].split()
    assert header == ["NAME", "MODEL", "VARIANTS", "READY", "SERVING", "REASON", "AGE"]
    header = crds.kubectl("get", "spool", "-n", namespace).splitlines()[0].split()
    assert header == ["NAME", "READY", "REASON", "FREE", "AGE"]
    both = crds.kubectl("get", "modelfleet", "-n", namespace, "-o", "name").split()
    assert both == ["modeldeployment.modelfleet.io/m", "servingpool.modelfleet.io/p"]


def test_explain_documents_every_field(crds: Cluster) -> None:
    for kind in ("modeldeployment", "servingpool"):
        schema = json.loads(crds.kubectl("get", "crd", f"{kind}s.modelfleet.io", "-o", "json"))
        tree = schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
        missing = [path for part in ("spec", "status") for path in undocumented(tree[part], part)]
        assert not missing
    text = crds.kubectl("explain", "modeldeployment.spec.variants.quantization")
    assert "How the weights are quantized" in text
    assert "NVFP4" in text.partition("ENUM:")[2]
    text = crds.kubectl("explain", "servingpool.spec.accelerators.memoryPerNode")
    assert "as a quantity: 28Gi" in text


def undocumented(node: Body, path: str) -> list[str]:
    found = [] if node.get("description") else [path]
    for name, child in node.get("properties", {}).items():
        found += undocumented(child, f"{path}.{name}")
    items = node.get("items", {})
    for name, child in items.get("properties", {}).items():
        found += undocumented(child, f"{path}[].{name}")
    return found


def test_status_is_a_subresource(crds: Cluster, namespace: str) -> None:
    crds.apply({**deployment(), "status": {"ready": "9/9"}}, namespace=namespace)
    assert "ready" not in crds.get("mdep", "m", namespace).get("status", {})
