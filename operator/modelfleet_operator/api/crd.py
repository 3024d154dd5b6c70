"""CustomResourceDefinitions from the API types: ``python -m modelfleet_operator.api.crd`` prints them.

Kubernetes asks for structural schemas: no references, no unions but int-or-string, one type at each place.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import yaml
from pydantic import BaseModel

from modelfleet_operator.api.base import GROUP, VERSION, ApiModel
from modelfleet_operator.api.model_deployment import ModelDeployment
from modelfleet_operator.api.serving_pool import ServingPool

MODEL_DEPLOYMENT_COLUMNS: Final = (
    ("Model", "string", ".status.model", 0),
    ("Variants", "string", ".status.variantNames", 0),
    ("Ready", "string", ".status.ready", 0),
    ("Serving", "string", ".status.conditions[?(@.type=='Serving')].status", 0),
    ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 0),
    ("Pool", "string", ".spec.pool", 1),
    ("Replicas", "integer", ".status.readyReplicas", 1),
    ("Suspended", "boolean", ".spec.suspend", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
SERVING_POOL_COLUMNS: Final = (
    ("Ready", "string", ".status.conditions[?(@.type=='Ready')].status", 0),
    ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 0),
    ("Free", "string", ".status.free", 0),
    ("Address", "string", ".status.address", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
_DROPPED: Final = ("title", "$defs", "x-map-key", "discriminator")


def custom_resource_definitions() -> list[dict[str, Any]]:
    """The CRDs of the group, ready for YAML."""
    return [
        _definition(ModelDeployment, "modeldeployments", "mdep", MODEL_DEPLOYMENT_COLUMNS),
        _definition(ServingPool, "servingpools", "spool", SERVING_POOL_COLUMNS),
    ]


def _definition(
    kind: type[ApiModel], plural: str, short: str, columns: tuple[tuple[str, str, str, int], ...]
) -> dict[str, Any]:
    name = kind.__name__
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "modelfleet", "app.kubernetes.io/part-of": "modelfleet"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": name,
                "listKind": f"{name}List",
                "plural": plural,
                "singular": name.lower(),
                "shortNames": [short],
                "categories": ["modelfleet"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": title, "type": type_, "jsonPath": path, **({"priority": 1} if wide else {})}
                        for title, type_, path, wide in columns
                    ],
                    "schema": {"openAPIV3Schema": structural_schema(kind)},
                }
            ],
        },
    }


def structural_schema(kind: type[ApiModel]) -> dict[str, Any]:
    """The structural OpenAPI schema of a resource."""
    schema = kind.model_json_schema(by_alias=True, mode="validation")
    tree = _structural(schema, schema.get("$defs", {}), _models_by_name(kind))
    # The API server has its own schema of these.
    tree["properties"]["apiVersion"] = {"type": "string"}
    tree["properties"]["kind"] = {"type": "string"}
    tree["properties"]["metadata"] = {"type": "object"}
    tree["required"] = ["spec"]
    return tree


def _models_by_name(kind: type[BaseModel]) -> dict[str, type[ApiModel]]:
    found: dict[str, type[ApiModel]] = {}
    stack: list[type[ApiModel]] = [ApiModel]
    while stack:
        for child in stack.pop().__subclasses__():
            found[child.__name__] = child
            stack.append(child)
    found[""] = found[kind.__name__]  # the root has no name in its own schema
    return found


def _structural(
    node: dict[str, Any], definitions: dict[str, Any], models: dict[str, type[ApiModel]], name: str = ""
) -> dict[str, Any]:
    own = {key: value for key, value in node.items() if key not in _DROPPED}
    if "$ref" in own:
        name = own.pop("$ref").rsplit("/", 1)[1]
        return _described(_structural(definitions[name], definitions, models, name), own)
    if own.get("x-kubernetes-int-or-string"):
        return own  # the one union that there is
    if "anyOf" in own:  # Optional[X]: absence is said by leaving the field out
        (branch,) = [b for b in own.pop("anyOf") if b.get("type") != "null"]
        return _described(_structural(branch, definitions, models, "\0"), own)
    if own.get("default", 0) is None:
        del own["default"]
    if node.get("type") == "object":
        _object(own, node, definitions, models, name)
    elif node.get("type") == "array":
        own["items"] = _structural(node["items"], definitions, models, "\0")
        if key := node.get("x-map-key"):
            own |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
        else:
            own["x-kubernetes-list-type"] = "atomic"
    if "const" in own:
        own["enum"] = [own.pop("const")]
    return own


def _object(
    own: dict[str, Any],
    node: dict[str, Any],
    definitions: dict[str, Any],
    models: dict[str, type[ApiModel]],
    name: str,
) -> None:
    additional = own.pop("additionalProperties", None)
    own.pop("propertyNames", None)
    if "properties" in node:
        own["properties"] = {
            key: _structural(value, definitions, models, "\0") for key, value in node["properties"].items()
        }
        if name in models:
            validations = [_validation(rule) for rule in models[name].rules if rule.cel]
            if validations:
                own["x-kubernetes-validations"] = validations
    elif isinstance(additional, dict):
        own["additionalProperties"] = _structural(additional, definitions, models, "\0")
    else:
        own["x-kubernetes-preserve-unknown-fields"] = True


def _validation(rule: Any) -> dict[str, str]:
    validation = {"rule": rule.cel, "message": rule.message}
    # A field path must exist in the schema below the rule; the root's metadata is opaque to CRDs.
    if rule.field and not rule.field.startswith("metadata"):
        validation["fieldPath"] = f".{rule.field}"
    return validation


def _described(schema: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a reference (description, default) over what it refers to."""
    extra = {key: value for key, value in own.items() if not (key == "default" and value is None)}
    if isinstance(extra.get("default"), dict):
        extra["default"] = {}  # the API server fills in the defaults of the fields below
    return schema | extra


class _Dumper(yaml.SafeDumper):
    """Writes repeated parts out: anchors are hard to read and some tools refuse them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def render() -> dict[str, str]:
    """YAML text of each CRD by file name."""
    header = "# Generated from operator/modelfleet_operator/api by `make generate`. Do not edit.\n"
    return {
        f"{crd['metadata']['name']}.yaml": header + yaml.dump(crd, Dumper=_Dumper, sort_keys=False, width=110)
        for crd in custom_resource_definitions()
    }


if __name__ == "__main__":
    sys.stdout.write("---\n".join(render().values()))
