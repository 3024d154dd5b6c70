"""Writes every generated file: of the CRDs, the chart, and the catalogue. ``--check`` tells which are stale.

Manifests for an installation without Helm are rendered from the chart: ``make generate-install``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chart_values import chart_files

from modelfleet_operator.api.crd import render
from modelfleet_serving.engines import sglang, vllm

ROOT = Path(__file__).parents[1]


def generated_files() -> dict[Path, str]:
    """Content of each generated file."""
    crds = render()
    manifests = ROOT / "manifests"
    return {
        **{manifests / "crds" / name: text for name, text in crds.items()},
        **chart_files(ROOT / "charts" / "modelfleet", manifests, crds),
        ROOT / "operator" / "modelfleet_operator" / "catalog" / "reserved.json": reserved(),
    }


def reserved() -> str:
    """Options and variables of each engine that something else sets: the planner must not import engines."""
    engines = {"vLLM": vllm, "SGLang": sglang}
    tables = {name: {"args": e.RESERVED, "env": e.OWNED_ENV} for name, e in engines.items()}
    return json.dumps(tables, indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Write or check."""
    files = generated_files()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make generate`")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
