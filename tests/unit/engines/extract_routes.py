"""Writes the HTTP paths that an engine's sources register, without importing them.

Usage: python tests/unit/engines/extract_routes.py PATH > tests/unit/engines/data/ENGINE-VERSION-routes.json

PATH is ``vllm/entrypoints`` or ``sglang/srt/entrypoints/http_server.py`` in an unpacked wheel.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

METHODS = {"get", "post", "put", "delete"}


def routes(tree: ast.Module) -> set[str]:
    """``METHOD /path`` of each ``@router.post("/path")`` or ``@app.api_route("/path", methods=[…])``."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for call in node.decorator_list:
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args):
                continue
            path = call.args[0]
            if not (isinstance(path, ast.Constant) and isinstance(path.value, str)):
                continue
            methods = [call.func.attr] if call.func.attr in METHODS else []
            if call.func.attr == "api_route":
                methods = next(
                    (ast.literal_eval(k.value) for k in call.keywords if k.arg == "methods"), ["GET"]
                )
            found |= {f"{method.upper()} {path.value}" for method in methods}
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1])
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    everything = set().union(*(routes(ast.parse(file.read_text())) for file in files))
    json.dump(sorted(everything, key=lambda route: route.split(" ")[::-1]), sys.stdout, indent=1)
    sys.stdout.write("\n")
