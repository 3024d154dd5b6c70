"""The measured boots, planned again with the same settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelfleet_operator.planner import AcceleratorGroup, NodeCapacity, PoolView, VariantPlan, VariantRequest
from modelfleet_operator.planner.config import facts_from_config
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.placement import plan_variant
from modelfleet_serving.contract import EngineSettings, LoraSettings, Task

DATA = Path(__file__).parent / "data"
MEASURED: dict[str, Any] = json.loads((DATA / "measured.json").read_text())
HELD_OUT: dict[str, Any] = json.loads((DATA / "held_out.json").read_text())


@dataclass(frozen=True)
class Config:
    """A checkpoint's config, as its publisher wrote it."""

    model: str
    parameters: int | None
    config: dict[str, Any]

    @property
    def facts(self) -> ModelFacts:
        return facts_from_config(self.config, source=f"hf://{self.model}")


def config(model: str) -> Config:
    data = json.loads((DATA / "configs" / f"{model.replace('/', '--')}.json").read_text())
    return Config(data["model"], data["parameters"], data["config"])


def all_configs() -> list[Config]:
    return [config(path.stem.replace("--", "/")) for path in sorted((DATA / "configs").glob("*.json"))]


def pool(*names: str, gpus: int = 1, nodes: int = 1) -> PoolView:
    return PoolView(
        tuple(
            AcceleratorGroup(
                name,
                (
                    NodeCapacity((), 16, 64, nodes)
                    if name == "CPU"
                    else NodeCapacity((1.0,) * gpus, count=nodes),
                ),
            )
            for name in names
        )
    )


def row_request(row: dict[str, Any]) -> VariantRequest:
    found = config(row["model"])
    facts = found.facts
    if row.get("textOnly"):  # booted as the language model alone
        text = found.config["text_config"] | {
            "architectures": ["Gemma3ForCausalLM"],
            "torch_dtype": "bfloat16",
        }
        facts = facts_from_config(text)
    if "tensorBytes" in row:  # as the safetensors headers of the checkpoint would say
        facts = facts_from_config(found.config, tensor_bytes={"BF16": row["tensorBytes"]})
    settings = row["settings"]
    lora = settings.get("lora")
    engine = EngineSettings(
        type="vLLM",
        version=row.get("version", MEASURED["version"]),
        max_model_len=settings["maxModelLen"],
        max_num_batched_tokens=settings["maxNumBatchedTokens"],
        max_num_seqs=settings["maxNumSeqs"],
        kv_cache_dtype=settings.get("kvCacheDtype"),
        dtype=settings.get("dtype"),
        lora=LoraSettings(max_loras=lora["maxLoras"], max_rank=lora["maxRank"]) if lora else None,
        gpu_memory_percent=round(row["memoryShare"] * 100),
        args={"enforce-eager": True} if row.get("eager") else {},
    )
    return VariantRequest(facts, row["quantization"], engine, task=Task(row.get("task", "Generate")))


def planned(row: dict[str, Any]) -> VariantPlan:
    result = plan_variant(row_request(row), pool("H100"))
    assert result.plan is not None, result.message
    return result.plan
