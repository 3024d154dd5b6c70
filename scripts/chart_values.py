"""The chart's values, told once: values.yaml has names, defaults and meanings; schema and README follow.

A comment ``# -- TEXT`` above a key describes it; ``# @schema {…}`` adds JSON Schema to what the default says
of the type. ``crd`` there takes the schema of a ServingPool's field, ``router-settings`` the router's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from modelfleet_operator.api.crd import structural_schema
from modelfleet_operator.api.serving_pool import ServingPool
from modelfleet_serving.router.settings import Settings as RouterSettings

TABLE_BEGIN: Final = "<!-- values: written by `make generate` -->"
TABLE_END: Final = "<!-- end of values -->"
_NAME: Final = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_TYPES: Final[dict[type, str]] = {
    str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array",
    type(None): "null",
}  # fmt: skip
_SET_BY_CHART: Final = frozenset(
    {
        "listen",
        "registry",
        "routes",
        "token_file",
        "router_id",
        "workers",
        "tenants",
        "tls_certificate",
        "tls_key",
    }
)
"""Settings of the router that have values of their own, or make no sense in a cluster."""


class ValuesError(ValueError):
    """values.yaml says too little or too much."""


@dataclass
class Value:
    """One key of values.yaml."""

    path: tuple[str, ...]
    default: Any
    text: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    children: list[Value] = field(default_factory=list)


def read_values(source: str) -> list[Value]:
    """The top level of values.yaml.

    Raises:
        ValuesError: a value has no description.
    """
    document = yaml.compose(source, Loader=yaml.SafeLoader)
    assert isinstance(document, yaml.MappingNode)
    return list(_children(document, source.splitlines(), ()))


def _children(node: yaml.MappingNode, lines: Sequence[str], path: tuple[str, ...]) -> Iterator[Value]:
    for key, content in node.value:
        value = Value((*path, key.value), _plain(content))
        value.text, value.extra = _comment(lines, key.start_mark.line)
        described = bool(value.text)
        if isinstance(content, yaml.MappingNode) and not described:
            value.children = list(_children(content, lines, value.path))
        if not described and not value.children:
            raise ValuesError(f"{'.'.join(value.path)} has no description")
        yield value


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _comment(lines: Sequence[str], line: int) -> tuple[str, dict[str, Any]]:
    """Description and schema in the comment right above a line."""
    block: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].lstrip().removeprefix("#").strip())
    text: list[str] = []
    extra: dict[str, Any] = {}
    for entry in block:
        if entry.startswith("-- "):
            text = [entry.removeprefix("-- ")]
        elif entry.startswith("@schema "):
            extra = yaml.safe_load(entry.removeprefix("@schema "))
        elif text:
            text.append(entry)
    return " ".join(text), extra


def schema(values: Sequence[Value]) -> dict[str, Any]:
    """The JSON Schema of values.yaml: everything is known, nothing else is let in."""
    properties = {value.path[-1]: _schema(value) for value in values}
    properties["global"] = {"type": "object", "description": "Helm's, for charts that hold this one."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart modelfleet",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _schema(value: Value) -> dict[str, Any]:
    if value.children:
        properties = {child.path[-1]: _schema(child) for child in value.children}
        return {"type": "object", "additionalProperties": False, "properties": properties}
    extra = dict(value.extra)
    described = {"description": value.text}
    if name := extra.pop("crd", None):
        return described | _of_pool(name)
    if extra.pop("router-settings", False):
        names = sorted(set(RouterSettings.__struct_fields__) - _SET_BY_CHART)
        extra["propertyNames"] = {
            "enum": [n.replace("_", "-") for n in names] + [n for n in names if "_" in n]
        }
    return described | {"type": _type(value.default)} | extra


def _type(default: Any) -> str:
    return _TYPES[type(default)]


def _of_pool(name: str) -> dict[str, Any]:
    whole = structural_schema(ServingPool)["properties"]
    if name == "name":
        return {
            "type": "string",
            "minLength": 1,
            "maxLength": 40,
            "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        }
    found = _strict(whole["spec"]["properties"][name])
    assert isinstance(found, dict)
    return {key: content for key, content in found.items() if key != "description"}


def _strict(part: Any) -> Any:
    """A structural schema as JSON Schema that lets nothing unknown in."""
    if isinstance(part, list):
        return [_strict(each) for each in part]
    if not isinstance(part, dict):
        return part
    found = {k: _strict(v) for k, v in part.items() if not k.startswith("x-kubernetes-") and k != "default"}
    if "properties" in part and "additionalProperties" not in part:
        found["additionalProperties"] = False
    return found


def table(values: Sequence[Value]) -> str:
    """The README's table of values."""
    rows = ["| value | default | is |", "|---|---|---|"]
    for value in _leaves(values):
        default = json.dumps(value.default, ensure_ascii=False)
        shown = f"`{default}`" if len(default) <= 60 else "see values.yaml"
        text = value.text.replace("|", "\\|")
        rows.append(f"| `{'.'.join(value.path)}` | {shown} | {text} |")
    return "\n".join(rows)


def _leaves(values: Sequence[Value]) -> Iterator[Value]:
    for value in values:
        if value.children:
            yield from _leaves(value.children)
        else:
            yield value


def with_table(readme: str, values: Sequence[Value]) -> str:
    """README with its table replaced.

    Raises:
        ValuesError: the README has no place for it.
    """
    before, begin, rest = readme.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not begin or not end:
        raise ValuesError(f"README.md lacks {TABLE_BEGIN} or {TABLE_END}")
    return f"{before}{begin}\n\n{table(values)}\n\n{end}{after}"


def chart_files(chart: Path, manifests: Path, crds: dict[str, str]) -> dict[Path, str]:
    """Content of the chart's generated files; rules and policy are those of the installation without Helm."""
    values = read_values((chart / "values.yaml").read_text())
    readme = chart / "README.md"
    return {
        chart / "values.schema.json": json.dumps(schema(values), indent=2, ensure_ascii=False) + "\n",
        readme: with_table(readme.read_text(), values),
        chart / "files" / "operator-rules.yaml": _below("rules", manifests / "rbac" / "clusterrole.yaml"),
        chart / "files" / "lease-rules.yaml": _below("rules", manifests / "rbac" / "role.yaml"),
        chart / "files" / "pool-in-use.yaml": _below(
            "spec", manifests / "admission" / "servingpool-in-use.yaml"
        ),
        **{chart / "crds" / name: text for name, text in crds.items()},
    }


def _below(key: str, file: Path) -> str:
    """The text of a key of the first document, with its comments."""
    document = file.read_text().split("\n---\n")[0].rstrip() + "\n"
    _, found, text = document.partition(f"\n{key}:\n")
    if not found:
        raise ValuesError(f"{file} has no {key}")
    return f"# The {key} of {file.parent.name}/{file.name}; written by `make generate`.\n{text}"
