"""Writes every generated file: the CRDs. With ``--check`` only tells which are stale."""

from __future__ import annotations

import sys
from pathlib import Path

from modelfleet_operator.api.crd import render

ROOT = Path(__file__).parents[1]


def generated_files() -> dict[Path, str]:
    """Content of each generated file."""
    return {ROOT / "manifests" / "crds" / name: text for name, text in render().items()}


def main() -> int:
    """Write or check."""
    stale = [p for p, text in generated_files().items() if not p.exists() or p.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make generate`")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(generated_files()[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
