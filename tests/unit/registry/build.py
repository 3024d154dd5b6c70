"""Builders of heartbeats and routes."""

from __future__ import annotations

from typing import Any

from modelfleet_serving.contract import EndpointState, Heartbeat, RouteSpec, VariantRouteSpec


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
