"""What the engines' tests share: settings to draw, and parsers built from what an engine declares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from modelfleet_serving.contract import ApplicationArgs, EngineSettings, LoraSettings, Task
from modelfleet_serving.engines import Launch, Platform

DATA = Path(__file__).parent / "data"


def load(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def lines(name: str) -> list[str]:
    return (DATA / name).read_text().splitlines()


def application(engine: EngineSettings, **changes: Any) -> ApplicationArgs:
    fields: dict[str, Any] = {
        "namespace": "default",
        "deployment": "m",
        "model": "m",
        "variant": "v",
        "revision": "abc",
        "source": "file:///models/m",
        "registry": "http://127.0.0.1:8267",
    }
    return ApplicationArgs(engine=engine, **(fields | changes))


def launch(**changes: Any) -> Launch:
    return Launch(**({"python": "/env/bin/python", "model": "/models/m", "port": 9000} | changes))


class RefusedError(Exception):
    """The engine's parser would have ended the process."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RefusedError(message)


_NUMBERS: dict[str | None, Any] = {
    "int": int,
    "float": float,
    "json.loads": json.loads,
    "loads": json.loads,
    "human_readable_int": int,
    "human_readable_int_or_auto": int,
}


def parser(options: dict[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """A parser with the options that an engine declares."""
    result = _Parser()
    for name, option in options.items():
        names = [name, *option.get("aliases", [])]
        destination = name.removeprefix("--").replace("-", "_")
        if option.get("action") == "store_true":
            result.add_argument(*names, dest=destination, action="store_true")
        elif option.get("action") == "boolean_optional":
            result.add_argument(*names, dest=destination, action=argparse.BooleanOptionalAction)
        else:
            kind = _NUMBERS.get(option.get("type"), str)
            result.add_argument(
                *names,
                dest=destination,
                type=kind,
                nargs=option.get("nargs"),
                choices=[kind(choice) for choice in option["choices"]] if option.get("choices") else None,
                required=option.get("required", False),
            )
    return result


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
lora = st.builds(
    LoraSettings,
    max_loras=st.integers(1, 8),
    max_rank=st.sampled_from((1, 8, 16, 64, 512)),
    max_cpu_loras=optional(st.integers(7, 32)),
)


def settings(
    engine: str,
    free: dict[str, st.SearchStrategy[Any]],
    kv_cache_dtypes: tuple[str, ...],
    quantizations: tuple[str, ...],
) -> st.SearchStrategy[EngineSettings]:
    """Settings of an engine; a few of them wrong."""
    return st.builds(
        EngineSettings,
        type=st.just(engine),
        max_model_len=optional(st.integers(1, 1 << 15)),
        gpu_memory_percent=optional(st.integers(1, 101)),
        kv_cache_memory_bytes=optional(st.integers(1, 1 << 36)),
        max_num_seqs=optional(st.integers(0, 512)),
        chunked_prefill=optional(st.booleans()),
        max_num_batched_tokens=optional(st.integers(500, 1 << 16)),
        prefix_caching=optional(st.booleans()),
        dtype=optional(st.sampled_from(("auto", "bfloat16", "float16", "float32"))),
        kv_cache_dtype=optional(st.sampled_from(kv_cache_dtypes)),
        quantization=optional(st.sampled_from(quantizations)),
        load_format=optional(st.sampled_from(("auto", "dummy", "safetensors"))),
        tensor_parallel_size=st.integers(1, 8),
        pipeline_parallel_size=st.integers(1, 4),
        lora=optional(lora),
        tool_call_parser=optional(st.just("hermes")),
        reasoning_parser=optional(st.just("qwen3")),
        multimodal_limits=st.dictionaries(st.sampled_from(("image", "video", "audio")), st.integers(0, 9)),
        trust_remote_code=st.booleans(),
        args=st.fixed_dictionaries({}, optional=free),
    )


def starts(drawn: st.SearchStrategy[EngineSettings]) -> st.SearchStrategy[tuple[ApplicationArgs, Launch]]:
    """Whole starts around drawn settings."""

    def build(engine: EngineSettings, model: str, task: Task, **facts: Any) -> Any:
        return application(engine, model=model, task=task), launch(**facts)

    return st.builds(
        build,
        drawn,
        names,
        st.sampled_from(Task),
        platform=st.sampled_from(Platform),
        port=st.integers(1, 65535),
        model_revision=optional(st.just("main")),
        host=st.sampled_from(("127.0.0.1", "0.0.0.0", "::1")),
    )
