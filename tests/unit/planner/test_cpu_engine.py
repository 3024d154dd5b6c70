"""The KV cache of vLLM's CPU engine: the token count that it logs equals ours."""

from __future__ import annotations

import pytest
from tests.unit.planner.measured import MEASURED, config

from modelfleet_operator.catalog.engines import engine_defaults
from modelfleet_operator.planner.kv_cache import kv_layout


@pytest.mark.parametrize("row", MEASURED["cpu"], ids=[row["name"] for row in MEASURED["cpu"]])
def test_tokens_equal_what_the_engine_logged(row: dict[str, object]) -> None:
    defaults = engine_defaults("vLLM", str(row["version"]))
    assert defaults is not None
    layout = kv_layout(
        config(str(row["model"])).facts,
        block_size=defaults.cpu_block_size,
        dtype_bytes=2,
        tensor_parallel=1,
        pipeline_parallel=1,
        in_flight_tokens=0,
    )
    memory, context = int(str(row["kvCacheBytes"])), int(str(row["maxModelLen"]))
    assert layout.tokens(memory, context) == row["kvCacheTokens"]
