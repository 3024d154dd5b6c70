"""``python -m modelfleet_serving.simulator``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from modelfleet_serving.simulator.config import GIB, SCALING_EFFICIENCY, TASKS, Config, profiles
from modelfleet_serving.simulator.faults import Faults, changed
from modelfleet_serving.simulator.scheduler import Limits, Speed

IGNORED: Final = (
    "dtype",
    "gpu-memory-utilization",
    "kv-cache-dtype",
    "limit-mm-per-prompt",
    "load-format",
    "max-lora-rank",
    "pipeline-parallel-size",
    "quantization",
    "reasoning-parser",
    "tool-call-parser",
)
"""Options of real engines that say nothing about time: taken, so that a deployment can be tried as it is."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m modelfleet_serving.simulator",
        description="An OpenAI server that simulates an inference engine: batching, queueing, KV cache, "
        "prefix cache and faults, without a model. Its answers are made up.",
        epilog="Options without a default here have the profile's value. See docs/simulator.md.",
        allow_abbrev=False,
    )
    _server_options(result.add_argument_group("server"))
    _engine_options(result.add_argument_group("engine"))
    _speed_options(result.add_argument_group("speed"))
    _fault_options(result.add_argument_group("faults"))
    ignored = result.add_argument_group("taken for the sake of real engines, without effect")
    for name in IGNORED:
        ignored.add_argument(f"--{name}", metavar="VALUE")
    ignored.add_argument("--trust-remote-code", action="store_true")
    return result


def _server_options(group: Any) -> None:
    group.add_argument(
        "--model", required=True, help="the weights, and the model's name if it is given no other"
    )
    group.add_argument("--served-model-name", "--model-alias", nargs="+", default=[], metavar="NAME",
                       help="names to serve the model under; the first is the one in answers")  # fmt: skip
    group.add_argument("--task", choices=TASKS, default="any", help="serves only this task's endpoints")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument(
        "--port", type=_bounded(int, 0, 65535), default=8000, help="0 takes a free one and prints it"
    )
    group.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=PATH",
                       help='adapters to begin with, NAME=PATH or {"name": …, "path": …}')  # fmt: skip
    group.add_argument("--enable-lora", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--seed", type=int, default=0, help="decides every answer and every drawn fault")
    group.add_argument("--output-tokens", type=_bounded(int, 1), default=128, metavar="N",
                       help="mean length of an answer without max_tokens (default: 128)")  # fmt: skip
    group.add_argument("--embedding-size", type=_bounded(int, 1, 65536), default=384, metavar="N")
    group.add_argument("--start-delay", type=_bounded(float, 0), default=0.0, metavar="S",
                       help="seconds before it listens, as an engine that loads weights")  # fmt: skip
    group.add_argument("--shutdown-timeout", type=_bounded(float, 0), default=0.0, metavar="S",
                       help="seconds that running requests get on SIGTERM (default: 0, abort)")  # fmt: skip


def _engine_options(group: Any) -> None:
    group.add_argument("--profile", choices=sorted(profiles()), default="fast",
                       help="a model on an accelerator (computed, not measured)")  # fmt: skip
    group.add_argument("--max-model-len", type=_bounded(int, 1), metavar="TOKENS")
    group.add_argument("--max-num-seqs", type=_bounded(int, 1), metavar="N")
    group.add_argument("--max-num-batched-tokens", type=_bounded(int, 1), metavar="TOKENS",
                       help="budget of one step (default: 8192, at least max-num-seqs)")  # fmt: skip
    group.add_argument("--max-num-queued-reqs", type=_bounded(int, 0), default=0, metavar="N",
                       help="waiting requests before 503 (default: 0, no bound)")  # fmt: skip
    group.add_argument("--enable-chunked-prefill", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--block-size", type=_bounded(int, 1, 1024), default=16, metavar="TOKENS")
    group.add_argument("--kv-cache-tokens", type=_bounded(int, 1), metavar="TOKENS")
    group.add_argument("--kv-cache-memory-bytes", type=_bounded(int, 1), metavar="BYTES")
    group.add_argument("--tensor-parallel-size", type=_bounded(int, 1, 64), default=1, metavar="N",
                       help=f"steps are 1 + {SCALING_EFFICIENCY}·(N-1) times as fast")  # fmt: skip
    group.add_argument("--max-loras", type=_bounded(int, 1), default=8, help="adapters in one batch")
    group.add_argument("--max-cpu-loras", type=_bounded(int, 1), help=argparse.SUPPRESS)


def _speed_options(group: Any) -> None:
    group.add_argument("--prefill-base-ms", type=_bounded(float, 0), metavar="MS")
    group.add_argument("--prefill-tokens-per-second", type=_bounded(float, 1), metavar="N")
    group.add_argument("--decode-base-ms", type=_bounded(float, 0), metavar="MS",
                       help="a step with one sequence")  # fmt: skip
    group.add_argument("--decode-per-sequence-us", type=_bounded(float, 0), metavar="US",
                       help="what each sequence adds to it")  # fmt: skip
    group.add_argument("--jitter", type=_bounded(float, 0, 1), default=0.0, metavar="SHARE",
                       help="standard deviation of a step's time")  # fmt: skip


def _fault_options(group: Any) -> None:
    names = ", ".join(Faults.__struct_encode_fields__)
    group.add_argument("--fault", action="append", default=[], metavar="NAME=VALUE",
                       help=f"order a fault; may be repeated; names: {names}")  # fmt: skip


def _bounded(kind: type[int | float], low: float, high: float | None = None) -> Any:
    def convert(text: str) -> float:
        value = kind(text)
        if value < low or (high is not None and value > high):
            bounds = f"{low} to {high}" if high is not None else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text}: {bounds}")
        return value

    convert.__name__ = kind.__name__
    return convert


def parse(argv: Sequence[str] | None = None) -> Config:
    """A configuration from the command line; ends the process with a usage message for a wrong one."""
    command_line = parser()
    options = command_line.parse_args(argv)
    try:
        return _config(options)
    except ValueError as error:
        command_line.error(str(error))


@dataclass(frozen=True)
class _Sizes:
    """Tokens and sequences that go together."""

    kv_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


def _sizes(options: argparse.Namespace) -> _Sizes:
    """The sizes asked for over the profile's.

    Raises:
        ValueError: they contradict one another.
    """
    profile = profiles()[options.profile]
    if options.kv_cache_tokens is not None:
        tokens = options.kv_cache_tokens
    else:
        size = options.kv_cache_memory_bytes or profile.kv_cache_gib * GIB
        tokens = int(size) * options.tensor_parallel_size // profile.kv_bytes_per_token
    blocks = tokens // options.block_size
    tokens = blocks * options.block_size
    max_model_len = options.max_model_len or min(profile.max_model_len, tokens)
    if max_model_len > tokens or not blocks:
        raise ValueError(f"--max-model-len {max_model_len}: more than the KV cache holds ({tokens} tokens)")
    max_num_seqs = options.max_num_seqs or profile.max_num_seqs
    budget = options.max_num_batched_tokens or max(8192, max_num_seqs)
    if budget < max_num_seqs:
        raise ValueError(f"--max-num-batched-tokens {budget}: at least --max-num-seqs ({max_num_seqs})")
    if not options.enable_chunked_prefill:
        budget = max(budget, max_model_len) if options.max_num_batched_tokens is None else budget
        if budget < max_model_len:
            raise ValueError(
                f"--max-num-batched-tokens {budget}: without chunked prefill a step holds whole prompts, "
                f"so at least --max-model-len ({max_model_len})"
            )
    return _Sizes(blocks, max_model_len, max_num_seqs, budget)


def _config(options: argparse.Namespace) -> Config:
    profile = profiles()[options.profile]
    sizes = _sizes(options)
    cache = sizes.kv_blocks * options.block_size * profile.kv_bytes_per_token
    names = options.served_model_name or [options.model]
    return Config(
        model=names[0],
        aliases=tuple(names[1:]),
        adapters=tuple(_adapter(text) for text in options.lora_modules),
        task=options.task,
        host=options.host,
        port=options.port,
        profile=options.profile,
        max_model_len=sizes.max_model_len,
        limits=Limits(
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            kv_blocks=sizes.kv_blocks,
            block_size=options.block_size,
            chunked_prefill=options.enable_chunked_prefill,
            prefix_caching=options.enable_prefix_caching,
            max_loras=options.max_loras,
            max_num_queued=options.max_num_queued_reqs,
        ),
        speed=_speed(options),
        weights_gib=profile.weights_gib,
        kv_cache_gib=round(cache / GIB / options.tensor_parallel_size, 2),
        seed=options.seed,
        output_tokens=options.output_tokens,
        embedding_size=options.embedding_size,
        start_delay=options.start_delay,
        shutdown_timeout=options.shutdown_timeout,
        enable_lora=options.enable_lora,
        faults=_faults(options.fault),
    )


def _speed(options: argparse.Namespace) -> Speed:
    profile = profiles()[options.profile]

    def value(given: float | None, preset: float) -> float:
        return preset if given is None else given

    gain = 1 + SCALING_EFFICIENCY * (options.tensor_parallel_size - 1)
    return Speed(
        prefill_base=value(options.prefill_base_ms, profile.prefill_base_ms) / 1e3 / gain,
        prefill_rate=value(options.prefill_tokens_per_second, profile.prefill_tokens_per_second) * gain,
        decode_base=value(options.decode_base_ms, profile.decode_base_ms) / 1e3 / gain,
        decode_per_sequence=value(options.decode_per_sequence_us, profile.decode_per_sequence_us)
        / 1e6
        / gain,
        jitter=options.jitter,
    )


def _adapter(text: str) -> tuple[str, str]:
    if text.startswith("{"):
        fields = json.loads(text)
        return fields["name"], fields["path"]
    name, found, path = text.partition("=")
    if not found or not name:
        raise ValueError(f'--lora-modules {text}: NAME=PATH or {{"name": …, "path": …}}')
    return name, path


def _faults(orders: Sequence[str]) -> Faults:
    changes: dict[str, Any] = {}
    for order in orders:
        name, found, value = order.partition("=")
        if not found:
            raise ValueError(f"--fault {order}: NAME=VALUE")
        changes[name] = json.loads(value)
    return changed(Faults(), changes)
