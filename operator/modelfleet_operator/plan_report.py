"""What `modelfleet plan` prints: a table, the arithmetic, or JSON and YAML in the words of status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modelfleet_operator.planner import Measurement, PlanResult, Rejection, VariantPlan

PIPED: Final = 200
WIDE: Final = 132
"""Columns of a terminal from which on the reasons stand in the table; below they follow it."""


@dataclass(frozen=True)
class Row:
    """One variant with its plan.

    Attributes:
        namespace: of the ModelDeployment.
        deployment: name of the ModelDeployment; the source where there is none.
        model: the OpenAI model id.
        variant: name of the variant.
        quantization: as declared.
        result: the planner's answer.
    """

    namespace: str
    deployment: str
    model: str
    variant: str
    quantization: str
    result: PlanResult


def render(rows: Sequence[Row], output: str, *, explain: bool, against: str) -> None:
    """Print the answer.

    Args:
        rows: all variants.
        output: ``table``, ``json`` or ``yaml``.
        explain: with the arithmetic.
        against: the pool that was planned with, for people.
    """
    if output == "table":
        # A pipe has no width: what reads it gets whole lines.
        console = Console(
            highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED
        )
        wide = console.width >= WIDE
        console.print(_table(rows, against, wide=wide))
        for part in _details(rows, explain=explain, reasons=not wide):
            console.print(part)
        return
    document = as_document(rows, explain=explain, against=against)
    text = json.dumps(document, indent=2) if output == "json" else yaml.safe_dump(document, sort_keys=False)
    sys.stdout.write(text.rstrip() + "\n")


def as_document(rows: Sequence[Row], *, explain: bool, against: str) -> dict[str, Any]:
    """The answer as data; fields that status has, too, bear its names."""
    return {
        "fits": all(row.result.fits for row in rows),
        "pool": against,
        "variants": [_entry(row, explain=explain) for row in rows],
    }


def _entry(row: Row, *, explain: bool) -> dict[str, Any]:
    result, plan = row.result, row.result.plan
    entry: dict[str, Any] = {
        "namespace": row.namespace,
        "deployment": row.deployment,
        "model": row.model,
        "name": row.variant,
        "quantization": row.quantization,
        "fits": result.fits,
        "reason": result.reason,
        "message": result.message,
    }
    if plan is not None:
        entry |= _plan_entry(plan)
    entry["rejections"] = [_rejection_entry(r, explain=explain) for r in result.rejections]
    if explain:
        entry["explain"] = list(plan.arithmetic) if plan is not None else []
        entry["alternatives"] = [_plan_entry(c) for c in result.candidates]
    return entry


def _plan_entry(plan: VariantPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "accelerator": plan.accelerator,
        "tensorParallel": plan.tensor_parallel_size,
        "pipelineParallel": plan.pipeline_parallel_size,
        "acceleratorsPerReplica": plan.accelerators_per_replica,
        "plan": {
            "weightsGiB": gib(plan.weights_gib),
            "overheadGiB": gib(plan.overhead_gib),
            "kvCacheGiB": gib(plan.kv_cache_gib),
            "kvCacheTokens": plan.kv_cache_tokens,
            "maxModelLen": plan.max_model_len,
            "measured": plan.measured is not None,
        },
        "dtype": plan.dtype,
        "kvCacheDtype": plan.kv_cache_dtype,
        "weightScheme": plan.weight_scheme,
        "maxSequences": round(plan.max_sequences, 2),
        "largestContext": plan.largest_context,
        "relativeCost": plan.cost,
        "costRank": plan.cost_rank,
        "spot": plan.spot,
        "placedNow": plan.placed_now,
        "settings": dict(plan.settings),
        "notes": list(plan.notes),
    }
    if plan.measured is not None and plan.estimate is not None:
        entry["measurement"] = _comparison(plan.estimate, plan.measured)
    return entry


def _comparison(estimate: Measurement, measured: Measurement) -> dict[str, Any]:
    return {
        name: {
            "estimate": expected,
            "measured": found,
            "errorPercent": round(100 * (expected / found - 1), 2),
        }
        for name, expected, found in (
            ("weightsGiB", estimate.weights_gib, measured.weights_gib),
            ("kvCacheGiB", estimate.kv_cache_gib, measured.kv_cache_gib),
            ("kvCacheTokens", estimate.kv_cache_tokens, measured.kv_cache_tokens),
        )
        if expected is not None and found
    }


def _rejection_entry(rejection: Rejection, *, explain: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "accelerator": rejection.accelerator,
        "reason": str(rejection.rule),
        "message": rejection.message,
        "source": rejection.source,
        "retryable": rejection.retryable,
    }
    if explain and rejection.arithmetic:
        entry["explain"] = list(rejection.arithmetic)
    return entry


def gib(value: float) -> str:
    """A size as status has it."""
    return f"{max(value, 0.0):.2f}"


def _table(rows: Sequence[Row], against: str, *, wide: bool) -> Table:
    several = len({row.deployment for row in rows}) > 1
    table = Table(
        title=f"Plan on {against}; sizes in GiB on each accelerator",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2 if wide else 1, 0, 0),
    )
    for name in ("MODEL", "VARIANT") if several else ("VARIANT",):
        table.add_column(name, no_wrap=True)
    table.add_column("ACCELERATOR", no_wrap=True)
    table.add_column("VERDICT", no_wrap=True)
    for name in ("WEIGHTS", "KV", "TOKENS", "CONTEXT", "SEQS", "COST"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("WHY", overflow="fold")
    for row in rows:
        names = [row.model, row.variant] if several else [row.variant]
        cells = _cells(row)
        table.add_row(*names, *(cells if wide else cells[:-1]))
    return table


def _cells(row: Row) -> list[RenderableType]:
    plan = row.result.plan
    if plan is None:
        named = {r.accelerator for r in row.result.rejections}
        where = named.pop() if len(named) == 1 else ""
        return [
            where or "-",
            Text("no", "bold red"),
            "",
            "",
            "",
            "",
            "",
            "",
            Text(_why_not(row.result), "red"),
        ]
    verdict = Text("fits", "green") if plan.placed_now or not row.result.message else Text("waits", "yellow")
    sequences = f"{plan.max_sequences:,.1f}" if plan.max_sequences < 100 else f"{plan.max_sequences:,.0f}"
    return [
        placement(plan),
        verdict,
        f"{plan.weights_gib:.1f}",
        f"{plan.kv_cache_gib:.1f}",
        f"{plan.kv_cache_tokens:,}",
        f"{plan.max_model_len:,}" if plan.max_model_len else "-",
        sequences,
        f"{plan.cost:g} #{plan.cost_rank}",
        _why(row.result, plan),
    ]


def placement(plan: VariantPlan) -> str:
    """Accelerator with its number: ``2 x A10``, ``0.3 x A100-80G``."""
    count = plan.accelerators_per_replica
    spot = " spot" if plan.spot else ""
    name = plan.accelerator + spot
    if plan.pipeline_parallel_size > 1:
        return f"{plan.pipeline_parallel_size} nodes of {plan.tensor_parallel_size} x {name}"
    return name if count in {0, 1} else f"{count:g} x {name}"


def _why(result: PlanResult, plan: VariantPlan) -> str:
    parts = [plan.weight_scheme, plan.dtype] if plan.weights_gib else [plan.weight_scheme]
    text = ", ".join(parts)
    if plan.measured is not None:
        text += ", as measured"
    if result.message:
        text += f"; {result.message}"
    refused = sorted({r.accelerator for r in result.rejections if r.accelerator})
    return f"{text}; not on {', '.join(refused)}" if refused else text


def _why_not(result: PlanResult) -> str:
    same = len({r.message for r in result.rejections}) == 1
    return f"{result.reason}: {result.message}" if same else f"{result.reason}: see below"


def _details(rows: Sequence[Row], *, explain: bool, reasons: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for row in rows:
        lines = _row_details(row, explain=explain, reasons=reasons)
        if lines:
            where = f" on {placement(row.result.plan)}" if row.result.plan else ""
            title = Text(f"\n{row.model}:{row.variant}{where}", "bold")
            parts.append(Group(title, Padding(Text("\n").join(lines), (0, 0, 0, 2))))
    return parts


def _row_details(row: Row, *, explain: bool, reasons: bool) -> list[Text]:
    plan, result = row.result.plan, row.result
    lines: list[Text] = []
    if plan is not None and reasons and (result.message or result.rejections or explain):
        lines.append(Text(_why(result, plan)))
    if plan is not None and explain:
        lines.append(Text(f"{placement(plan)}:", "green"))
        lines += [Text(f"  {line}") for line in plan.arithmetic]
        lines += [Text(f"  {name}: {reason}", "cyan") for name, reason in plan.settings.items()]
        if plan.measured is not None and plan.estimate is not None:
            lines += [
                Text(f"  {name}: estimate {v['estimate']:,.2f}, measured {v['measured']:,.2f}, "
                     f"error {v['errorPercent']:+.1f} %", "magenta")
                for name, v in _comparison(plan.estimate, plan.measured).items()
            ]  # fmt: skip
    if plan is not None:
        lines += [Text(f"note: {note}", "yellow") for note in plan.notes]
    shown = result.rejections if explain or plan is None else ()
    for rejection in shown:
        lines.append(
            Text(f"{rejection.accelerator or 'everywhere'}: {rejection.rule}: {rejection.message}", "red")
        )
        if explain:
            lines += [Text(f"  {line}", "dim") for line in rejection.arithmetic]
            if rejection.source:
                lines.append(Text(f"  source: {rejection.source}", "dim"))
    return lines
