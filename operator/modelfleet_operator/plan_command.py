"""`modelfleet plan`: which variant fits which accelerator, and why not. Creates nothing."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from modelfleet_operator.api import InvalidResourcesError, ModelDeployment, Problem, ServingPool
from modelfleet_operator.api.model_deployment import Source
from modelfleet_operator.catalog.accelerators import accelerators
from modelfleet_operator.clients.model_hub import ModelHub
from modelfleet_operator.local_store import load
from modelfleet_operator.plan_report import Row, render
from modelfleet_operator.planner import (
    AcceleratorGroup,
    AcceleratorPreference,
    AdapterFacts,
    ModelFacts,
    ModelUnavailable,
    NodeCapacity,
    PoolView,
    VariantRequest,
    plan_all,
    plan_variant,
)
from modelfleet_operator.planner.facts import CheckpointQuantization
from modelfleet_operator.planner.inputs import Facts, pool_view, sources_of, variant_request
from modelfleet_operator.planner.quantization import checkpoint_names
from modelfleet_serving.contract import EngineSettings

EXIT_FITS: Final = 0
EXIT_DOES_NOT_FIT: Final = 1
EXIT_INVALID: Final = 2
CATALOGUE: Final = "one node of every accelerator in the catalogue"
CATALOGUE_GPUS: Final = 8
CATALOGUE_CPU: Final = NodeCapacity(cpus=64, memory_gib=256)
AT_LOAD: Final = ("FP8", "INT8")
ELSEWHERE: Final[Mapping[str, CheckpointQuantization]] = {
    "AWQ": CheckpointQuantization("awq", "w4a16", 4, group_size=128, symmetric=False),
    "GPTQ": CheckpointQuantization("gptq", "w4a16", 4, group_size=128),
    "NVFP4": CheckpointQuantization("modelopt_fp4", "nvfp4", 4, group_size=16),
}
"""Quantizations that need a checkpoint of their own, with the settings that such checkpoints mostly have."""


@dataclass(frozen=True)
class PlanOptions:
    """What the command line asked for.

    Attributes:
        files: ModelDeployments, and maybe their ServingPools.
        pool_files: ServingPools.
        model: a source to compare on all accelerators instead.
        output: ``table``, ``json`` or ``yaml``.
        explain: show the arithmetic.
    """

    files: Sequence[Path]
    pool_files: Sequence[Path] = ()
    model: str | None = None
    output: str = "table"
    explain: bool = False


async def run_plan(options: PlanOptions, hub: ModelHub | None = None) -> int:
    """Plan and print.

    Returns:
        The exit code: 0 when everything fits, 1 when something does not, 2 when there is nothing to plan
        because the input is wrong.
    """
    hub = hub or ModelHub()
    if options.model is not None and (problem := _source_problem(options.model)):
        sys.stderr.write(f"{problem}\n")
        return EXIT_INVALID
    try:
        pools = load(options.pool_files).pools if options.pool_files else {}
        if options.model is not None:
            rows, against = await _compare(options.model, pools, hub)
        else:
            rows, against = await _plan_files(options, pools, hub)
    except InvalidResourcesError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_INVALID
    reasons = {row.result.message for row in rows}
    if (
        options.model is not None
        and options.output == "table"
        and len(reasons) == 1
        and not rows[0].result.fits
    ):
        sys.stderr.write(f"{reasons.pop()}\n")  # one reason for all accelerators is said once
        return EXIT_DOES_NOT_FIT
    render(rows, options.output, explain=options.explain, against=against)
    if options.model is not None:
        return EXIT_FITS if any(row.result.fits for row in rows) else EXIT_DOES_NOT_FIT
    return EXIT_FITS if all(row.result.fits for row in rows) else EXIT_DOES_NOT_FIT


def _source_problem(source: str) -> str:
    """What is wrong with a source; empty where nothing is."""
    try:
        TypeAdapter(Source).validate_python(source)
    except ValidationError:
        hint = f"; did you mean hf://{source}?" if re.fullmatch(r"[\w.-]+/[\w.@-]+", source) else ""
        if Path(source).is_dir():
            hint = f"; did you mean file://{Path(source).absolute()}?"
        return f"{source!r} is no source: write hf://org/name, file:///path, s3://, gs://, pvc:// or oci://{hint}"
    return ""


async def _plan_files(
    options: PlanOptions, pools: Mapping[str, ServingPool], hub: ModelHub
) -> tuple[list[Row], str]:
    resources = load(options.files)
    known = {**resources.pools, **pools}
    deployments = list(resources.deployments.values())
    if not deployments:
        where = ", ".join(str(path) for path in options.files)
        raise InvalidResourcesError([Problem(where, "", "holds no ModelDeployment to plan")])
    facts = await _read(hub, {source for d in deployments for source in sources_of(d)})
    rows: list[Row] = []
    names = set()
    for pool_name in dict.fromkeys(d.spec.pool for d in deployments):
        pool = _find_pool(known, pool_name)
        names.add(f"pool {pool.metadata.name}" if pool else CATALOGUE)
        mine = [d for d in deployments if d.spec.pool == pool_name]
        rows += _plan_pool(mine, pool_view(pool) if pool else catalogue_view(), facts)
    return rows, ", ".join(sorted(names)) or CATALOGUE


def _plan_pool(deployments: Sequence[ModelDeployment], view: PoolView, facts: Facts) -> list[Row]:
    pairs = [(d, v) for d in deployments for v in d.spec.variants]
    requests = {
        f"{d.key}/{v.name}": variant_request(d, v, facts, replicas=0 if d.spec.suspend else v.replicas.min)
        for d, v in pairs
    }
    results = plan_all(requests, view)
    return [
        Row(
            d.metadata.namespace,
            d.metadata.name,
            d.model_name,
            v.name,
            v.quantization,
            results[f"{d.key}/{v.name}"],
        )
        for d, v in pairs
    ]


def _find_pool(pools: Mapping[str, ServingPool], name: str) -> ServingPool | None:
    """The pool of that name; the only one where no other name is meant."""
    found = [p for p in pools.values() if p.metadata.name == name]
    if not found and name == "default" and len(pools) == 1:
        found = list(pools.values())
    return found[0] if found else None


def catalogue_view(*, slices: bool = True) -> PoolView:
    """One empty node of each accelerator, for plans without a pool; with the slices of GPUs or without."""
    return PoolView(
        tuple(
            AcceleratorGroup(
                name,
                (
                    CATALOGUE_CPU
                    if kind.is_cpu
                    else NodeCapacity((1.0,) * (1 if kind.slice else CATALOGUE_GPUS)),
                ),
            )
            for name, kind in accelerators().items()
            if slices or not kind.slice
        )
    )


async def _compare(source: str, pools: Mapping[str, ServingPool], hub: ModelHub) -> tuple[list[Row], str]:
    """Every quantization of a model on every accelerator, each as if it were alone."""
    pool = next(iter(pools.values()), None)
    view = pool_view(pool) if pool else catalogue_view(slices=False)
    found = (await _read(hub, {source}))[source]
    assert not isinstance(found, AdapterFacts)  # noqa: S101  a model's source was asked for
    rows = []
    for quantization, facts in _quantizations(found):
        for group in view.groups:
            request = VariantRequest(
                facts,
                quantization,
                EngineSettings(type="vLLM"),
                (AcceleratorPreference(group.accelerator),),
                replicas=0,
            )
            result = plan_variant(request, view)
            rows.append(Row("", source, source, quantization, quantization, result))
    return _ranked(rows), f"pool {pool.metadata.name}" if pool else CATALOGUE


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows with the rank of their cost among all of them."""
    costs = sorted({row.result.plan.cost for row in rows if row.result.plan})
    ranked = []
    for row in rows:
        plan = row.result.plan
        if plan is not None:
            plan = replace(plan, cost_rank=costs.index(plan.cost) + 1)
        ranked.append(replace(row, result=replace(row.result, plan=plan)))
    return ranked


def _quantizations(
    found: ModelFacts | ModelUnavailable,
) -> list[tuple[str, ModelFacts | ModelUnavailable]]:
    if isinstance(found, ModelUnavailable):
        return [("None", found)]
    if found.quantization is not None:
        return [(min(checkpoint_names(found.quantization)), found)]
    same: list[tuple[str, ModelFacts | ModelUnavailable]] = [(name, found) for name in ("None", *AT_LOAD)]
    # Another checkpoint's bytes are not these: its size comes from the architecture's arithmetic.
    others = [(name, replace(found, quantization=q, tensor_bytes={})) for name, q in ELSEWHERE.items()]
    return [*same, *others]


async def _read(hub: ModelHub, sources: set[str]) -> Facts:
    ordered = sorted(sources)
    answers = await asyncio.gather(*(hub.facts(source) for source in ordered))
    return dict(zip(ordered, answers, strict=True))
