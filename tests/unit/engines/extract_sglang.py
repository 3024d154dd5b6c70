"""Writes the command-line options that SGLang's sources declare, without importing them.

Usage: python extract_sglang.py SITE_PACKAGES > data/sglang-VERSION-options.json

SITE_PACKAGES holds an unpacked ``sglang`` wheel. Options stand there as annotated fields,
``name: A[type, "help"]`` or ``name: A[type, Arg(...)]``, and as a few ``add_argument`` calls.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

SCALARS = {"int", "float", "str"}


def constants(tree: ast.Module) -> dict[str, Any]:
    """Module-level constants."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            found[node.targets[0].id] = value
    return found


def evaluate(node: ast.expr | None, names: dict[str, Any]) -> Any:
    """A literal, a known list, or a sum of lists; ``None`` for what only running the code would tell."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = evaluate(node.left, names), evaluate(node.right, names)
        return left + right if isinstance(left, list) and isinstance(right, list) else None
    if isinstance(node, ast.List):
        items = [evaluate(item, names) for item in node.elts]
        return None if None in items else items
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def field_option(node: ast.AnnAssign, names: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    annotation = node.annotation
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return None
    assert isinstance(node.target, ast.Name)
    assert isinstance(annotation.slice, ast.Tuple)
    kind, *metadata = annotation.slice.elts
    call = next((m for m in metadata if isinstance(m, ast.Call) and ast.unparse(m.func) == "Arg"), None)
    keywords = {k.arg: k.value for k in call.keywords} if call else {}
    if evaluate(keywords.get("no_cli"), names):
        return None
    kind_text = ast.unparse(kind)
    inner = (
        kind_text.removeprefix("Optional[").removesuffix("]")
        if kind_text.startswith("Optional[")
        else kind_text
    )
    name = evaluate(keywords.get("cli_name"), names) or "--" + node.target.id.replace("_", "-")
    option: dict[str, Any] = {"aliases": evaluate(keywords.get("aliases"), names) or []}
    action = ast.unparse(keywords["action"]) if "action" in keywords else ""
    parser = ast.unparse(keywords["type_parser"]) if "type_parser" in keywords else ""
    choices = evaluate(keywords.get("choices"), names)
    nargs = evaluate(keywords.get("nargs"), names)
    if "BooleanOptionalAction" in action:
        option["action"] = "boolean_optional"
    elif action:
        extra = keywords.get("action_kwargs")
        option["nargs"] = (
            ast.literal_eval(ast.unparse(extra).replace("'type': str, ", "")) if extra else {}
        ).get("nargs")
    elif inner == "bool" and not parser:
        option["action"] = "store_true"
    else:
        if inner.startswith("Literal["):
            choices = choices or list(
                ast.literal_eval("[" + inner.removeprefix("Literal[").removesuffix("]") + "]")
            )
            option["type"] = type(choices[0]).__name__
        elif inner.startswith(("List[", "list[")) and not parser:
            element = inner[5:-1]
            option["type"] = element if element in SCALARS else "str"
            nargs = nargs or "+"
        else:
            option["type"] = parser or (inner if inner in SCALARS else "str")
        option["choices"] = choices
        option["nargs"] = nargs
    option["required"] = node.value is None
    return name, {key: value for key, value in option.items() if value not in (None, [], False)}


def call_option(node: ast.Call, names: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    keywords = {k.arg: k.value for k in node.keywords}
    first, *aliases = [evaluate(argument, names) for argument in node.args]
    option: dict[str, Any] = {"aliases": aliases}
    action = ast.unparse(keywords["action"]).strip("'") if "action" in keywords else ""
    if "StoreConst" in action:
        option["nargs"] = None
    elif action:
        option["action"] = "store_true"
    else:
        option["type"] = "str"
    option["choices"] = evaluate(keywords.get("choices"), names)
    return first, {key: value for key, value in option.items() if value not in (None, [], False)}


def extract(site_packages: Path) -> dict[str, dict[str, Any]]:
    groups = site_packages / "sglang/srt/arg_groups"
    names: dict[str, Any] = {}
    sources = [
        groups / "choices.py",
        site_packages / "sglang/srt/utils/common.py",
        *sorted((groups / "fields").glob("*.py")),
    ]
    trees = [ast.parse(path.read_text()) for path in sources]
    for tree in trees:
        names |= constants(tree)
    options: dict[str, dict[str, Any]] = {}
    for tree in trees[2:]:
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and (found := field_option(node, names)):
                options[found[0]] = found[1]
    server = ast.parse((site_packages / "sglang/srt/server_args.py").read_text())
    for node in ast.walk(server):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_argument":
            name, option = call_option(node, names)
            options[name] = option
    return dict(sorted(options.items()))


if __name__ == "__main__":
    json.dump(extract(Path(sys.argv[1])), sys.stdout, indent=1)
    sys.stdout.write("\n")
