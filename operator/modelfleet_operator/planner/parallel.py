"""Which tensor and pipeline parallel sizes a model allows, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Iterator

from modelfleet_operator.planner.facts import ModelFacts

MAX_TENSOR_PARALLEL = 64


def tensor_parallel_problem(facts: ModelFacts, size: int) -> str | None:
    """Why a model can't be split over so many GPUs; ``None`` where it can.

    Query heads must divide evenly; KV heads either divide evenly or are replicated evenly (vLLM
    ``ModelConfig.verify_with_parallel_config`` and ``QKVParallelLinear``). MLPs must divide evenly, and a
    rank's share must hold whole quantization groups or blocks.
    """
    if size == 1:
        return None
    if facts.heads % size:
        return f"{facts.heads} attention heads don't divide by {size}"
    if facts.kv_heads % size and size % facts.kv_heads and not facts.uses_mla:
        return f"{facts.kv_heads} KV heads neither divide by {size} nor replicate evenly over it"
    if facts.intermediate_size % size:
        return f"the MLP's {facts.intermediate_size} columns don't divide by {size}"
    if facts.expert_intermediate_size % size:
        return f"the experts' {facts.expert_intermediate_size} columns don't divide by {size}"
    return _group_problem(facts, size)


def _group_problem(facts: ModelFacts, size: int) -> str | None:
    quantization = facts.quantization
    if quantization is None:
        return None
    unit = quantization.group_size or (quantization.block[0] if quantization.block else None)
    if unit is None or unit <= 32:  # microscaled formats are padded by the engines
        return None
    for name, columns in (
        ("MLP", facts.intermediate_size if not facts.experts else 0),
        ("experts", facts.expert_intermediate_size),
    ):
        if columns and (columns // size) % unit and columns % unit == 0:
            return (
                f"split over {size}, the {name} keep {columns // size} columns of a rank, "
                f"no multiple of the quantization's {unit}"
            )
    return None


def tensor_parallel_sizes(facts: ModelFacts, most: int) -> Iterator[int]:
    """Legal sizes up to ``most``, smallest first."""
    for size in range(1, min(most, MAX_TENSOR_PARALLEL) + 1):
        if size & (size - 1) and size != most and facts.heads % size:
            continue
        if tensor_parallel_problem(facts, size) is None:
            yield size


def splits(
    facts: ModelFacts,
    *,
    tensor_parallel: int | None,
    pipeline_parallel: int | None,
    count: int | None,
    gpus_per_node: int,
    nodes: int,
) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) sizes to try, fewest GPUs first.

    Args:
        facts: the model.
        tensor_parallel: fixed by the user.
        pipeline_parallel: fixed by the user.
        count: GPUs of one replica, fixed by the user.
        gpus_per_node: of the accelerator's nodes; tensor parallelism stays inside one.
        nodes: nodes that there may be; pipeline stages go across them.
    """
    if tensor_parallel is not None or pipeline_parallel is not None:
        yield tensor_parallel or max((count or 1) // (pipeline_parallel or 1), 1), pipeline_parallel or 1
        return
    if count is not None:
        yield from _split_of(facts, count, gpus_per_node)
        return
    sizes = list(tensor_parallel_sizes(facts, max(gpus_per_node, 1)))
    yield from ((size, 1) for size in sizes)
    largest = sizes[-1] if sizes else 1
    for stages in range(2, min(nodes * max(gpus_per_node // largest, 1), facts.layers) + 1):
        yield largest, stages


def _split_of(facts: ModelFacts, count: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """Ways to use exactly ``count`` GPUs: the widest tensor parallelism first."""
    for size in sorted(tensor_parallel_sizes(facts, min(count, max(gpus_per_node, 1))), reverse=True):
        if count % size == 0 and count // size <= facts.layers:
            yield size, count // size
