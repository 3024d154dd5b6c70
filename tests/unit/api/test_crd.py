"""The CRDs are generated, structural, and say what the types say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelfleet_operator.api.crd import custom_resource_definitions, render


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, value in schema.get("properties", {}).items():
        yield from nodes(value, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


SCHEMAS = {
    crd["spec"]["names"]["kind"]: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for crd in custom_resource_definitions()
}


@pytest.mark.parametrize(("name", "text"), render().items())
def test_files_are_fresh(name: str, text: str) -> None:
    assert Path("manifests/crds", name).read_text() == text, "stale: run `make generate`"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_structural(kind: str) -> None:
    for path, node in nodes(SCHEMAS[kind]):
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
            assert node["anyOf"] == [{"type": "integer"}, {"type": "string"}], path
            assert node.keys() >= {"pattern", "maxLength", "minimum"}, path
            continue
        assert "type" in node, path
        assert not node.keys() & {"$ref", "anyOf", "oneOf", "allOf", "const", "title", "$defs"}, path
        assert ("properties" in node) + ("additionalProperties" in node) <= 1, path
        assert node["type"] != "number", f"{path}: floats don't survive every client"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_explain_has_a_text_for_every_field(kind: str) -> None:
    spec = SCHEMAS[kind]["properties"]["spec"]
    silent = [path for path, node in nodes(spec) if "description" not in node and not path.endswith("[]")]
    assert silent == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_lists_and_strings_are_bounded_where_rules_walk_them(kind: str) -> None:
    spec = SCHEMAS[kind]["properties"]["spec"]
    for path, node in nodes(spec):
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path


def test_pass_through_options_are_the_only_open_fields() -> None:
    open_fields = {
        path
        for schema in SCHEMAS.values()
        for path, node in nodes(schema)
        if node.get("x-kubernetes-preserve-unknown-fields")
    }
    assert open_fields == {".spec.engine.args", ".spec.variants[].engine.args"}


def test_every_quantity_may_be_a_number() -> None:
    quantities = {
        path.rpartition(".")[2]
        for schema in SCHEMAS.values()
        for path, node in nodes(schema["properties"]["spec"])
        if node.get("x-kubernetes-int-or-string")
    }
    assert quantities == {"kvCacheMemory", "cpusPerNode", "memoryPerNode", "cpu", "memory"}
