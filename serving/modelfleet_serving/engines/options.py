"""Command-line options: checking the typed fields, rendering the rest, and keeping the two apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from modelfleet_serving.contract import ApplicationArgs, EngineSettings, LoraSettings
from modelfleet_serving.engines.base import Launch, SettingsProblem

_NAME: Final = re.compile(r"[A-Za-z0-9]+([_.-][A-Za-z0-9]+)*\Z")
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?\Z")
_SECRET: Final = re.compile(r"key|token\Z|secret|password|credential", re.IGNORECASE)
_HIDDEN: Final = "***"
_PORTS: Final = range(1, 65536)


def canonical(name: str) -> str:
    """An option's name with dashes, as engines compare it; keys behind a first dot stay as they are."""
    head, dot, rest = name.partition(".")
    return head.replace("_", "-") + dot + rest


def option(name: str, value: object) -> str:
    """``--name=value`` in one argument, so that a value may begin with a dash."""
    return f"--{name}={_text(value)}"


def whole_seconds(seconds: float) -> int:
    """Rounded up: a time limit is never cut short."""
    return math.ceil(seconds)


def merge(defaults: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Our defaults under the user's ``args``: ``no-x: true`` takes the place of a default ``x``."""
    merged = dict(defaults)
    for name, value in args.items():
        key = canonical(name)
        positive = key.removeprefix("no-")
        if positive != key and positive in merged and isinstance(value, bool):
            merged[positive] = not value
        else:
            merged[key] = value
    return merged


def render(args: Mapping[str, Any]) -> list[str]:
    """Options in the contract's terms, as arguments.

    ``True`` is a bare flag, ``False`` its ``--no-`` form, a list repeats the values behind one option,
    an object is JSON, ``None`` leaves the option out. The values were checked by :func:`args_problems`.
    """
    rendered: list[str] = []
    for name, value in args.items():
        if value is None:
            continue
        if value is True:
            rendered.append(f"--{name}")
        elif value is False:
            rendered.append(f"--no-{name}")
        elif isinstance(value, list | tuple):
            rendered += [f"--{name}", *(_text(item) for item in value)]
        else:
            rendered.append(option(name, value))
    return rendered


def shared_options(args: ApplicationArgs, launch: Launch) -> dict[str, Any]:
    """The options that vLLM and SGLang call by the same names."""
    settings = args.engine
    return {
        "served-model-name": args.model,
        "host": launch.host,
        "port": launch.port,
        "revision": launch.model_revision,
        "kv-cache-dtype": settings.kv_cache_dtype,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "load-format": settings.load_format,
        "tool-call-parser": settings.tool_call_parser,
        "reasoning-parser": settings.reasoning_parser,
        "trust-remote-code": True if settings.trust_remote_code else None,
    }


def shared_environment(launch: Launch) -> dict[str, str]:
    """The variables that every engine on Hugging Face's and NVIDIA's libraries reads."""
    env: dict[str, str] = {}
    if launch.model_is_local:
        env["HF_HUB_OFFLINE"] = "1"
    if launch.visible_devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(launch.visible_devices)
    return env


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, separators=(",", ":"))
    return str(value)


def args_problems(
    args: Mapping[str, Any],
    reserved: Mapping[str, str],
    *,
    negatable: Collection[str] | None = None,
    flags: Collection[str] = (),
) -> Iterator[SettingsProblem]:
    """What is wrong with the free options.

    Args:
        args: As the user wrote them.
        reserved: Options that something else sets, with what sets them.
        negatable: Options with a ``--no-`` form, where only some have one; ``None`` where all have.
        flags: Options without a ``--no-`` form, where all others have one.
    """
    seen: dict[str, str] = {}
    for name, value in args.items():
        where = f"engine.args.{name}"
        if not _NAME.match(name):
            yield SettingsProblem(where, name, "write an option's name without leading dashes, spaces or '='")
            continue
        key = canonical(name)
        positive = key.removeprefix("no-")
        if positive in seen:
            yield SettingsProblem(where, value, f"is the same option as engine.args.{seen[positive]}")
        seen[positive] = name
        if owner := _owner(key, reserved):
            # What stands in the wrong place may be a secret, and problems go to status and logs.
            yield SettingsProblem(where, _HIDDEN if _SECRET.search(key) else value, owner)
        elif value is False and _lacks_negation(positive, negatable, flags):
            yield SettingsProblem(where, value, "the engine has no --no- form of it; leave the option out")
        else:
            yield from _value_problems(where, value)


def _owner(key: str, reserved: Mapping[str, str]) -> str | None:
    """Why this option may not be given freely, or ``None`` if it may."""
    head = key.partition(".")[0]
    for name in (head, head.removeprefix("no-"), _inverse(head)):
        if name in reserved:
            return f"is set by {reserved[name]}"
    # The engines' parsers complete unique beginnings: --max-model sets --max-model-len.
    for name, owner in reserved.items():
        if name.startswith(head):
            return f"may be taken as short for --{name}, which is set by {owner}; write the whole name"
    return None


def _inverse(name: str) -> str:
    for prefix, other in (("disable-", "enable-"), ("enable-", "disable-")):
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def _lacks_negation(name: str, negatable: Collection[str] | None, flags: Collection[str]) -> bool:
    return name in flags or (negatable is not None and name not in negatable)


def _value_problems(where: str, value: Any) -> Iterator[SettingsProblem]:
    if isinstance(value, list | tuple):
        if not value:
            yield SettingsProblem(where, value, "a list needs at least one value; null leaves the option out")
        for item in value:
            text = _text(item)
            if text.startswith("-") and not _NUMBER.match(text):
                yield SettingsProblem(where, item, "a value in a list can't begin with a dash")
    elif not isinstance(value, str | int | float | Mapping | None):
        yield SettingsProblem(where, value, "text, a number, true, false, a list, an object or null")
    if isinstance(value, float) and not math.isfinite(value):
        yield SettingsProblem(where, value, "a finite number")


def settings_problems(args: ApplicationArgs, launch: Launch, engine: str) -> Iterator[SettingsProblem]:
    """What is wrong with the typed fields, as far as it is wrong for every engine."""
    settings = args.engine
    if settings.type != engine:
        yield SettingsProblem("engine.type", settings.type, f"this is the adapter of {engine}")
    if launch.port not in _PORTS:
        yield SettingsProblem("port", launch.port, "1..65535")
    if not launch.model or launch.model.startswith("-"):
        yield SettingsProblem("source", launch.model, "a directory or a model id")
    yield from _number_problems(settings)
    yield from _lora_problems(settings.lora)
    for modality, limit in settings.multimodal_limits.items():
        if limit < 0:
            yield SettingsProblem(f"engine.multimodalLimits.{modality}", limit, "0 or more")
    if args.drain_timeout_seconds < 0:
        yield SettingsProblem("drainTimeout", args.drain_timeout_seconds, "0 seconds or more")


def _number_problems(settings: EngineSettings) -> Iterator[SettingsProblem]:
    share = settings.gpu_memory_percent
    if share is not None and not 1 <= share <= 100:
        yield SettingsProblem("engine.gpuMemoryPercent", share, "1..100")
    at_least_one = {
        "kvCacheMemoryBytes": settings.kv_cache_memory_bytes,
        "maxNumSeqs": settings.max_num_seqs,
        "maxNumBatchedTokens": settings.max_num_batched_tokens,
        "maxModelLen": settings.max_model_len,
        "tensorParallelSize": settings.tensor_parallel_size,
        "pipelineParallelSize": settings.pipeline_parallel_size,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            yield SettingsProblem(f"engine.{name}", value, "1 or more")
    chunked = settings.chunked_prefill is not False
    tokens, length, seqs = settings.max_num_batched_tokens, settings.max_model_len, settings.max_num_seqs
    if tokens and length and not chunked and tokens < length:
        yield SettingsProblem(
            "engine.maxNumBatchedTokens",
            tokens,
            f"at least engine.maxModelLen ({length}): without chunked prefill a step holds whole prompts",
        )
    if tokens and seqs and tokens < seqs:
        yield SettingsProblem(
            "engine.maxNumBatchedTokens",
            tokens,
            f"at least engine.maxNumSeqs ({seqs}), a token for each",
        )


def _lora_problems(lora: LoraSettings | None) -> Iterator[SettingsProblem]:
    if lora is None:
        return
    if lora.max_loras < 1:
        yield SettingsProblem("engine.lora.maxLoras", lora.max_loras, "1 or more")
    if lora.max_cpu_loras is not None and lora.max_cpu_loras < lora.max_loras:
        yield SettingsProblem(
            "engine.lora.maxCpuLoras", lora.max_cpu_loras, f"at least engine.lora.maxLoras ({lora.max_loras})"
        )


def one_of(field: str, value: str | None, allowed: Collection[str]) -> Iterator[SettingsProblem]:
    """A problem when ``value`` is given and not among ``allowed``."""
    if value is not None and value not in allowed:
        yield SettingsProblem(field, value, "one of " + ", ".join(sorted(allowed)))


def env_problems(env: Mapping[str, str], owned: Mapping[str, str]) -> Iterator[SettingsProblem]:
    """A problem for each variable of ``env`` that something else sets."""
    for name, value in env.items():
        if name in owned:
            yield SettingsProblem(f"engine.env.{name}", _HIDDEN, f"is set by {owned[name]}")
        elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            yield SettingsProblem(f"engine.env.{name}", _HIDDEN, "a name of letters, digits and underscores")
