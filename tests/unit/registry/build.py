"""Builders of heartbeats and routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from modelfleet_serving.contract import EndpointState, Heartbeat, RouteSpec, VariantRouteSpec


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until something is true."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds:g} s"
        await asyncio.sleep(0.01)


def beat(name: str, sequence: int, **fields: Any) -> Heartbeat:
    defaults: dict[str, Any] = {
        "application": "default.m.a.r1",
        "model": "m",
        "url": f"http://127.0.0.1:9000/{name}",
        "state": EndpointState.READY,
    }
    return Heartbeat(id=name, sequence=sequence, **{**defaults, **fields})


def route(deployment: str = "m", name: str | None = None, **fields: Any) -> RouteSpec:
    defaults: dict[str, Any] = {
        "variants": [VariantRouteSpec(name="a", revisions={"r1": 100})],
        "weights": {"a": 100},
    }
    return RouteSpec(
        name=name or deployment, namespace="default", deployment=deployment, **{**defaults, **fields}
    )
