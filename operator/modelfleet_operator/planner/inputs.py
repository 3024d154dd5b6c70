"""From API resources to the planner's inputs."""

from __future__ import annotations

from modelfleet_operator.api.base import quantity_value
from modelfleet_operator.api.engine import EngineSpec
from modelfleet_operator.api.model_deployment import ModelDeployment, Variant
from modelfleet_operator.api.serving_pool import AcceleratorGroup as PoolGroup
from modelfleet_operator.api.serving_pool import ServingPool
from modelfleet_operator.planner.facts import ModelFacts, ModelUnavailable
from modelfleet_operator.planner.types import (
    AcceleratorGroup,
    AcceleratorPreference,
    Measurement,
    NodeCapacity,
    PoolView,
    VariantRequest,
)
from modelfleet_serving.contract import EngineSettings, LoraSettings, Task

_DTYPES = {"BFloat16": "bfloat16", "Float16": "float16", "Float32": "float32"}
_KV_DTYPES = {"Auto": None, "FP8": "fp8", "FP8E4M3": "fp8_e4m3", "FP8E5M2": "fp8_e5m2"}
DEFAULT_LORA_RANK = 16
MOST_LORAS_IN_BATCH = 8


def engine_settings(engine: EngineSpec, *, adapters: int = 0) -> EngineSettings:
    """An engine spec in the wire's terms; adapters make room for LoRA by themselves."""
    lora = None
    if engine.lora is not None or adapters:
        spec = engine.lora
        lora = LoraSettings(
            max_loras=(spec.max_loras if spec else None) or min(max(adapters, 1), MOST_LORAS_IN_BATCH),
            max_rank=(spec.max_rank if spec else None) or DEFAULT_LORA_RANK,
            max_cpu_loras=spec.max_cpu_loras if spec else None,
        )
    limits = {}
    if engine.multimodal is not None:
        counts = {"image": engine.multimodal.images, "video": engine.multimodal.videos,
                  "audio": engine.multimodal.audios}  # fmt: skip
        limits = {name: count for name, count in counts.items() if count is not None}
    return EngineSettings(
        type=engine.type or "vLLM",
        version=engine.version,
        max_model_len=engine.max_model_len,
        gpu_memory_percent=engine.gpu_memory_percent,
        kv_cache_memory_bytes=int(quantity_value(engine.kv_cache_memory)) if engine.kv_cache_memory else None,
        max_num_seqs=engine.max_num_seqs,
        chunked_prefill=_switch(engine.chunked_prefill),
        max_num_batched_tokens=engine.max_num_batched_tokens,
        prefix_caching=_switch(engine.prefix_caching),
        dtype=_DTYPES[engine.dtype] if engine.dtype else None,
        kv_cache_dtype=_KV_DTYPES[engine.kv_cache_dtype] if engine.kv_cache_dtype else None,
        tensor_parallel_size=engine.tensor_parallel_size or 1,
        pipeline_parallel_size=engine.pipeline_parallel_size or 1,
        lora=lora,
        tool_call_parser=engine.tool_call_parser,
        reasoning_parser=engine.reasoning_parser,
        multimodal_limits=limits,
        trust_remote_code=bool(engine.trust_remote_code),
        args=dict(engine.args or {}),
        env={variable.name: variable.value for variable in engine.env or []},
    )


def _switch(value: str | None) -> bool | None:
    return None if value is None else value == "Enabled"


def variant_request(
    deployment: ModelDeployment,
    variant: Variant,
    facts: ModelFacts | ModelUnavailable | None,
    *,
    replicas: int | None = None,
    current: str | None = None,
) -> VariantRequest:
    """The request of one variant.

    Args:
        deployment: the resource.
        variant: one of its variants.
        facts: of the variant's checkpoint.
        replicas: to hold now; default the variant's minimum.
        current: accelerator that it runs on.
    """
    spec = deployment.spec
    return VariantRequest(
        model=facts,
        quantization=variant.quantization,
        engine=engine_settings(deployment.engine(variant), adapters=len(spec.adapters)),
        accelerators=tuple(AcceleratorPreference(a.type, a.count) for a in variant.accelerators),
        replicas=variant.replicas.min if replicas is None else replicas,
        task=Task(spec.model.task),
        adapters=len(spec.adapters),
        current=current,
        measurements=_measurements(deployment, variant.name),
    )


def _measurements(deployment: ModelDeployment, variant: str) -> tuple[Measurement, ...]:
    status = deployment.status
    row = next((v for v in status.variants if v.name == variant), None) if status else None
    return tuple(
        Measurement(
            accelerator=m.accelerator,
            tensor_parallel_size=m.tensor_parallel,
            weights_gib=float(m.weights_gi_b) if m.weights_gi_b else None,
            kv_cache_gib=float(m.kv_cache_gi_b) if m.kv_cache_gi_b else None,
            kv_cache_tokens=m.kv_cache_tokens,
        )
        for m in (row.measurements if row and row.measurements else ())
    )


def pool_view(pool: ServingPool) -> PoolView:
    """A pool as declared: every node that may be, none of it in use.

    For `modelfleet plan`. The operator plans with what it observes instead.
    """
    return PoolView(
        tuple(_group(group, managed=pool.spec.ray.cluster is not None) for group in pool.spec.accelerators)
    )


def _group(group: PoolGroup, *, managed: bool) -> AcceleratorGroup:
    node = node_template(group)
    return AcceleratorGroup(
        accelerator=group.type,
        nodes=(NodeCapacity(node.gpus, node.cpus, node.memory_gib, group.min_nodes),)
        if group.min_nodes
        else (),
        template=node,
        obtainable_nodes=group.max_nodes - group.min_nodes,
        spot=group.spot,
        ray_resource=ray_resource(group.type) if managed else None,
    )


def node_template(group: PoolGroup) -> NodeCapacity:
    """A wholly free node of a group as the pool declares it."""
    return NodeCapacity(
        gpus=() if group.type == "CPU" else (1.0,) * group.gpus_per_node,
        cpus=quantity_value(group.cpus_per_node) if group.cpus_per_node else float("inf"),
        memory_gib=quantity_value(group.memory_per_node) / 2**30 if group.memory_per_node else float("inf"),
    )


def ray_resource(accelerator: str) -> str:
    """Custom Ray resource that marks nodes with this accelerator in clusters that the operator makes."""
    return f"accelerator:{accelerator}"
