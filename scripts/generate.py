"""Writes every generated file: CRDs and what the chart takes over. ``--check`` only tells which are stale.

Manifests for an installation without Helm are rendered from the chart: ``make generate-install``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from chart_values import chart_files

from modelfleet_operator.api.crd import render

ROOT = Path(__file__).parents[1]


def generated_files() -> dict[Path, str]:
    """Content of each generated file."""
    crds = render()
    manifests = ROOT / "manifests"
    return {
        **{manifests / "crds" / name: text for name, text in crds.items()},
        **chart_files(ROOT / "charts" / "modelfleet", manifests, crds),
    }


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
