"""Resources from YAML text: all problems at once, each with its line, field, value and what is allowed."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modelfleet_operator.api.base import API_VERSION, RuleFailuresError
from modelfleet_operator.api.model_deployment import ModelDeployment
from modelfleet_operator.api.serving_pool import ServingPool

Resource = ModelDeployment | ServingPool
KINDS: dict[str, type[ModelDeployment | ServingPool]] = {
    "ModelDeployment": ModelDeployment,
    "ServingPool": ServingPool,
}
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a resource."""

    where: str
    """File and line, or the resource's name."""
    field: str
    message: str
    document: str = ""
    """Which of several in one text: its number, and what it calls itself."""

    def __str__(self) -> str:
        """As one line."""
        return ": ".join(part for part in (self.where, self.document, self.field, self.message) if part)


class InvalidResourcesError(ValueError):
    """Everything that is wrong with a text or an object."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems


class _Duplicate(Exception):  # noqa: N818  internal signal
    def __init__(self, key: str, line: int) -> None:
        super().__init__(key)
        self.key, self.line = key, line


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which PyYAML drops without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Duplicate(key.value, key.start_mark.line + 1)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# Timestamps stay strings: "2026-01-01" is never meant as a date here.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_resources(text: str, file: str) -> list[Resource]:
    """Resources of a YAML or JSON text with one or more documents.

    A ``List``, as kubectl prints it, stands for its items.

    Args:
        text: the documents.
        file: what problems call it.

    Raises:
        InvalidResourcesError: with all problems of all documents.
    """
    problems: list[Problem] = []
    resources: list[Resource] = []
    nodes = [item for node in _compose(text, file) for item in _items(node)]
    for number, node in enumerate(nodes, 1):
        try:
            resources.append(_parse_node(node, file))
        except InvalidResourcesError as error:
            name = _document(node, number) if len(nodes) > 1 else ""
            problems.extend(replace(problem, document=name) for problem in error.problems)
    if not resources and not problems:
        problems.append(Problem(file, "", "holds no resource"))
    if problems:
        raise InvalidResourcesError(problems)
    return resources


def parse_object(body: dict[str, Any], where: str = "") -> Resource:
    """A resource from an object as the API server gives it.

    Fields that this release does not know were let in by the CRD of a newer one, which a rollback leaves in
    place: they are passed over, as is a status that can't be read. In files they are mistakes.

    Raises:
        InvalidResourcesError: with all problems.
    """

    def name(_path: Path) -> str:
        return where or _name_of(body)

    try:
        return _build(body, name)
    except InvalidResourcesError as error:
        cause = error.__cause__
        if not isinstance(cause, ValidationError):
            raise
        return _build(_readable(body, cause), name)


def _readable(body: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The object without unknown fields, and without its status where that has other faults."""
    body = copy.deepcopy(body)
    for detail in error.errors():
        path = detail["loc"]
        if detail["type"] == "extra_forbidden":
            _value(body, path[:-1]).pop(path[-1], None)
        elif path[:1] == ("status",):
            body.pop("status", None)
    return body


def _compose(text: str, file: str) -> list[yaml.Node]:
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        detail = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise InvalidResourcesError([Problem(f"{file}{line}", "", f"not valid YAML: {detail}")]) from error
    except yaml.YAMLError as error:
        raise InvalidResourcesError([Problem(file, "", f"not valid YAML: {error}")]) from error
    return [n for n in nodes if not (isinstance(n, yaml.ScalarNode) and n.value in ("", "null", "~"))]


def _items(node: yaml.Node) -> Iterator[yaml.Node]:
    """The documents of a ``List``; any other one itself."""
    items = _child(node, "items")
    if _text(node, "kind") == "List" and isinstance(items, yaml.SequenceNode):
        yield from items.value
    else:
        yield node


def _document(node: yaml.Node, number: int) -> str:
    """What a document is called among several."""
    metadata = _child(node, "metadata")
    namespace, name = (_text(metadata, "namespace"), _text(metadata, "name")) if metadata else ("", "")
    key = f"{namespace}/{name}" if namespace else name
    called = " ".join(part for part in (_text(node, "kind"), key) if part)
    return f"document {number} ({called})" if called else f"document {number}"


def _child(node: yaml.Node, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value for name, value in pairs if name.value == key), None)


def _text(node: yaml.Node, key: str) -> str:
    child = _child(node, key)
    return str(child.value) if isinstance(child, yaml.ScalarNode) else ""


def _parse_node(node: yaml.Node, file: str) -> Resource:
    here = f"{file}:{node.start_mark.line + 1}"
    try:
        body = _Loader("").construct_document(node)
    except _Duplicate as error:
        raise InvalidResourcesError(
            [Problem(f"{file}:{error.line}", error.key, "stands twice in one object")]
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise InvalidResourcesError([Problem(here, "", f"not valid YAML: {error}")]) from error
    if not isinstance(body, dict):
        raise InvalidResourcesError([Problem(here, "", f"must be an object, not {_kind_of(body)}")])
    return _build(body, lambda path: f"{file}:{_line(node, path)}")


def _build(body: dict[str, Any], where: Any) -> Resource:
    problems = []
    if body.get("apiVersion") != API_VERSION:
        message = f"{_show(body.get('apiVersion'))} is not served here; use {API_VERSION}"
        problems.append(Problem(where(("apiVersion",)), "apiVersion", message))
    kind = KINDS.get(str(body.get("kind")))
    if kind is None:
        message = f"{_show(body.get('kind'))} is not a kind of {API_VERSION}; use {' or '.join(KINDS)}"
        raise InvalidResourcesError([*problems, Problem(where(("kind",)), "kind", message)])
    if problems:
        raise InvalidResourcesError(problems)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise InvalidResourcesError(
            [p for detail in error.errors() for p in _problems(detail, body, kind, where)]
        ) from error


def _problems(detail: ErrorDetails, body: Any, kind: type[BaseModel], where: Any) -> list[Problem]:
    path: Path = tuple(part for part in detail["loc"] if part != "[key]")
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, RuleFailuresError):
        found = []
        for rule in cause.rules:
            full = (*path, *(rule.field.split(".") if rule.field else ()))
            found.append(
                Problem(where(full), show_path(full), f"{rule.message} (is {_show(_value(body, full))})")
            )
        return found
    return [Problem(where(path), show_path(path), _message(detail, kind, path))]


def _message(detail: ErrorDetails, kind: type[BaseModel], path: Path) -> str:
    context = detail.get("ctx", {})
    value = _show(detail.get("input"))
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_field(kind, path)
        case "missing":
            return "is required"
        case "literal_error":
            return f"{value} is not allowed; use one of {context['expected']}"
        case "string_pattern_mismatch":
            return f"{value} is not allowed; must match {context['pattern']}"
        case "string_type":
            return f"{value} is {_kind_of(detail.get('input'))}; must be a string (put it in quotes)"
        case _:
            text = detail["msg"][:1].lower() + detail["msg"][1:]
            return f"{value} is not allowed; {text.replace('input ', '')}"


def _unknown_field(kind: type[BaseModel], path: Path) -> str:
    known = _fields_at(kind, path[:-1])
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
    return f"unknown field; {hint}"


@cache
def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    return kind.model_json_schema(by_alias=True)


def _fields_at(kind: type[BaseModel], path: Path) -> list[str]:
    """Names of the fields of the object at a path, by walking the schema."""
    schema = _schema(kind)
    definitions = schema.get("$defs", {})
    node: Any = schema
    for part in path:
        node = _resolve(node, definitions)
        node = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if node is None:
            return []
    return list(_resolve(node, definitions).get("properties", {}))


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    for branch in node.get("anyOf", []):
        if branch.get("type") != "null":
            node = branch
            break
    if "$ref" in node:
        return _resolve(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    return node


def show_path(path: Path) -> str:
    """``spec.variants[1].replicas`` of its parts."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _value(body: Any, path: Path) -> Any:
    for part in path:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            return None
    return body


def _line(node: yaml.Node, path: Path) -> int:
    """Line of the deepest node on a path that is in the text."""
    line: int = node.start_mark.line + 1
    for part in path:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    found, line = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line


def _show(value: Any) -> str:
    if value is None:
        return "not set"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind_of(value: Any) -> str:
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a string",
    }
    return "empty" if value is None else names.get(type(value), type(value).__name__)


def _name_of(body: dict[str, Any]) -> str:
    metadata = body.get("metadata") or {}
    return f"{body.get('kind', 'object')} {metadata.get('namespace', 'default')}/{metadata.get('name', '?')}"
