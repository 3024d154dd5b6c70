"""The chart as objects. ``python -m tests.chart.rendered`` writes manifests/install/ from it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tests.controlplane.bed import ensure

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "modelfleet"
INSTALL = ROOT / "manifests" / "install"
SYSTEM = "modelfleet-system"
_HELMS = ("helm.sh/chart", "app.kubernetes.io/managed-by")
# What the kustomization has from elsewhere, or a user adds when the CRDs are there.
_WITHOUT_HELM = (
    "rbac.create=false",
    "admissionPolicy.enabled=false",
    "crds.upgrade.enabled=false",
    "pool.create=false",
    f"router.registry=http://default-head-svc.{SYSTEM}.svc:8267",
    "router.token.secret=default-ray-token",
)

Object = dict[str, Any]


def template(*options: str, release: str = "modelfleet", namespace: str = SYSTEM) -> list[Object]:
    """What the chart renders to; hooks and tests included.

    Raises:
        subprocess.CalledProcessError: it can't be rendered; ``stderr`` says why.
    """
    helm = str(ensure(["helm"])["helm"])
    command = [helm, "template", release, str(CHART), "--namespace", namespace, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def only(objects: Sequence[Object], kind: str, name: str = "") -> Object:
    """The one object of a kind, and name."""
    found = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of kind {kind} {name}"
    return found[0]


def install_files() -> dict[Path, str]:
    """Content of manifests/install/, without what is written by hand."""
    settings = [part for value in _WITHOUT_HELM for part in ("--set", value)]
    files: dict[str, list[Object]] = {"operator": [], "router": [], "policies": []}
    for document in template(*settings):
        if "helm.sh/hook" in document["metadata"].get("annotations", {}):
            continue
        component = document["metadata"]["labels"]["app.kubernetes.io/component"]
        files[component if component in files else "policies"].append(_without_helm(document))
    header = "# Rendered from charts/modelfleet by `make generate-install`. Do not edit.\n"
    return {
        INSTALL / f"{name}.yaml": header + yaml.safe_dump_all(objects, sort_keys=False, width=110)
        for name, objects in files.items()
    }


def _without_helm(document: Object) -> Object:
    metadata = document["metadata"]
    metadata["name"] = metadata["name"].removesuffix(f".{SYSTEM}")
    for label in _HELMS:
        metadata["labels"].pop(label, None)
    return document


def main() -> int:
    """Write them."""
    for path, text in install_files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
