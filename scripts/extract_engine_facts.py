#!/usr/bin/env python3
"""Read from an engine's source what it says of quantization methods and architectures, without importing it.

    scripts/extract_engine_facts.py vLLM 0.33.0 SITE_PACKAGES > .../catalog/snapshots/vllm-0.33.0.json

The output is the snapshot that the catalogue keeps for each engine version; a test compares the catalogue's
legality table with it, and another one compares it with an installed engine.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

QUANTIZATION = {"vLLM": "vllm/model_executor/layers/quantization", "SGLang": "sglang/srt/layers/quantization"}
ABILITIES = {"lora": "SupportsLoRA", "pipeline": "SupportsPP", "multimodal": "SupportsMultiModal"}


def classes(root: Path) -> dict[str, ast.ClassDef]:
    """All classes below a folder by name."""
    found: dict[str, ast.ClassDef] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, node)
    return found


def bases(node: ast.ClassDef) -> list[str]:
    return [
        b.id if isinstance(b, ast.Name) else b.attr
        for b in node.bases
        if isinstance(b, ast.Name | ast.Attribute)
    ]


def inherited(name: str, known: dict[str, ast.ClassDef], seen: frozenset[str] = frozenset()) -> list[str]:
    """A class and its bases, nearest first."""
    if name not in known or name in seen:
        return [name]
    return [name, *(n for b in bases(known[name]) for n in inherited(b, known, seen | {name}))]


def method(name: str, function: str, known: dict[str, ast.ClassDef]) -> ast.FunctionDef | None:
    for owner in inherited(name, known):
        for node in known[owner].body if owner in known else []:
            if isinstance(node, ast.FunctionDef) and node.name == function and not is_abstract(node):
                return node
    return None


def is_abstract(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in node.decorator_list)


def usual_branch(value: ast.expr) -> ast.expr:
    """What a conditional returns in the usual case: ``a if not special else b``, ``b if special else a``."""
    if isinstance(value, ast.IfExp):
        return value.body if isinstance(value.test, ast.UnaryOp) else value.orelse
    return value


def minimum(name: str, known: dict[str, ast.ClassDef]) -> int | None:
    """What ``get_min_capability`` returns in the end: earlier returns are for other platforms."""
    node = method(name, "get_min_capability", known)
    last = node.body[-1] if node else None
    if not isinstance(last, ast.Return) or last.value is None:
        return None
    value = usual_branch(last.value)
    if (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and isinstance(value.func.value, ast.Name)
    ):
        return minimum(value.func.value.id, known) if value.func.value.id in known else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, int) else None


def dtypes(name: str, known: dict[str, ast.ClassDef]) -> list[str]:
    """Activation dtypes that ``get_supported_act_dtypes`` returns."""
    node = method(name, "get_supported_act_dtypes", known)
    returned = [r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value] if node else []
    names = {"half": "float16"}
    return sorted(
        {
            names.get(a.attr, a.attr)
            for value in returned
            for a in ast.walk(value)
            if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Name) and a.value.id == "torch"
        }
    )


def methods(init: Path) -> dict[str, str]:
    """Method names with the classes that the engine looks up for them."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and isinstance(key.value, str)
                    and isinstance(value, ast.Name)
                    and value.id.endswith(("Config", "config"))
                ):
                    found.setdefault(key.value, value.id)
    return found


def vllm_architectures(site: Path) -> dict[str, list[str]]:
    models = site / "vllm/model_executor/models"
    known = classes(models) | classes(site / "vllm/models")
    registry = ast.parse((models / "registry.py").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for node in ast.walk(registry):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                target = value.elts[1]
                if isinstance(target, ast.Constant) and isinstance(target.value, str):
                    line = set(inherited(target.value, known))
                    found[str(key.value)] = [word for word, base in ABILITIES.items() if base in line]
    return found


def sglang_architectures(site: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted((site / "sglang/srt/models").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "EntryClass" for t in node.targets
            ):
                for name in ast.walk(node.value):
                    if isinstance(name, ast.Name):
                        found[name.id] = []
    return found


def main() -> None:
    engine, version, site = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    root = site / QUANTIZATION[engine]
    known = classes(root)
    table = {
        name: {"class": config, "minCapability": minimum(config, known), "dtypes": dtypes(config, known)}
        for name, config in sorted(methods(root / "__init__.py").items())
        if config in known
    }
    architectures = vllm_architectures(site) if engine == "vLLM" else sglang_architectures(site)
    facts = {"engine": engine, "version": version, "methods": table}
    json.dump(facts | {"architectures": dict(sorted(architectures.items()))}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
