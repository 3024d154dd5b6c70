"""Starts a simulator."""

from __future__ import annotations

import gc
import resource
import sys

import uvloop

from modelfleet_serving.simulator.cli import parse
from modelfleet_serving.simulator.server import Simulator


def main() -> None:
    """Runs until it is told to end."""
    config = parse()
    _say(f"simulating {config.model} as {config.profile}: no model is loaded, all answers are made up")
    _say(f"Model loading took {config.weights_gib} GiB")
    _say(f"Available KV cache memory: {config.kv_cache_gib} GiB")
    concurrency = config.kv_cache_tokens / config.max_model_len
    _say(
        f"KV cache size: {config.kv_cache_tokens:,} tokens, "
        f"Maximum concurrency for {config.max_model_len:,} tokens per request: {concurrency:.2f}x"
    )
    simulator = Simulator(config)
    # A stream is an open file, and the usual limit is 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # A full collection with thousands of streams takes as long as a step; the request path makes no cycles
    # that matter.
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    uvloop.run(simulator.serve(ready=lambda: _say(f"listening on http://{config.host}:{simulator.port}")))


def _say(text: str) -> None:
    print(f"modelfleet-simulator: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
