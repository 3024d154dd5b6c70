"""`modelfleet get`: tables of ModelDeployments, with kubectl's columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, Final

import yaml
from rich.console import Console
from rich.table import Table

LINE_WIDTH: Final = 320


def render(documents: Sequence[dict[str, Any]], output: str, *, one: bool = False) -> None:
    """Print ModelDeployments.

    Args:
        documents: resources with status, as the API server gives them.
        output: ``table``, ``wide``, ``json`` or ``yaml``.
        one: a single one was asked for: no list around it, and its variants in the table.
    """
    if output in ("json", "yaml"):
        content: Any = documents[0] if one else {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        text = json.dumps(content, indent=2) if output == "json" else yaml.safe_dump(content, sort_keys=False)
        sys.stdout.write(text.rstrip() + "\n")
        return
    # As kubectl does: a line stays one line, and the terminal wraps it where it must.
    console = Console(highlight=False, width=LINE_WIDTH, soft_wrap=True)
    if not documents:
        console.print("No ModelDeployments.")
        return
    console.print(_deployments(documents, wide=output == "wide"))
    if one or output == "wide":
        console.print()
        console.print(_variants(documents))
        for document in documents:
            _explain(console, document)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def condition(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """One condition of a resource; empty where it has none yet."""
    found = [c for c in document.get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else {}


def _deployments(documents: Sequence[dict[str, Any]], *, wide: bool) -> Table:
    table = _table(
        "NAME", "MODEL", "VARIANTS", "READY", "SERVING", "REASON", *(["POOL", "SUSPENDED"] if wide else [])
    )
    for document in documents:
        status = document.get("status", {})
        table.add_row(
            document["metadata"]["name"],
            status.get("model", ""),
            status.get("variantNames", ""),
            status.get("ready", ""),
            condition(document, "Serving").get("status", ""),
            condition(document, "Ready").get("reason", ""),
            *(_wide(document["spec"]) if wide else []),
        )
    return table


def _wide(spec: dict[str, Any]) -> list[str]:
    return [spec.get("pool", "default"), str(spec.get("suspend", False)).lower()]


def _variants(documents: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "VARIANT",
        "REVISION",
        "ACCELERATOR",
        "TP",
        "READY",
        "WEIGHT",
        "WEIGHTS",
        "KV CACHE",
        "TOKENS",
        "REASON",
    )
    for document in documents:
        for row in document.get("status", {}).get("variants", []):
            plan = row.get("plan", {})
            table.add_row(
                row["name"],
                row.get("revision", ""),
                row.get("accelerator", ""),
                str(row.get("tensorParallel", "")),
                f"{row.get('readyReplicas', 0)}/{row.get('replicas', 0)}",
                str(row.get("weight", 0)),
                _gib(plan.get("weightsGiB")),
                _gib(plan.get("kvCacheGiB")),
                f"{plan['kvCacheTokens']:,}" if "kvCacheTokens" in plan else "",
                row.get("reason", ""),
            )
    return table


def _explain(console: Console, document: dict[str, Any]) -> None:
    for row in document.get("status", {}).get("variants", []):
        if row.get("message"):
            console.print(f"\n{row['name']}: {row['message']}", markup=False)
        for note in row.get("plan", {}).get("notes") or []:
            console.print(f"{row['name']}: note: {note}", markup=False)
        for rejection in row.get("rejections") or []:
            console.print(
                f"{row['name']} not on {rejection['accelerator']}: {rejection['message']}", markup=False
            )


def _gib(value: str | None) -> str:
    return f"{value} GiB" if value else ""
