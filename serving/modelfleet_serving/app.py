"""``build(args)``: the import path of every application that runs a model."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from ray import serve

from modelfleet_serving import engines
from modelfleet_serving.contract import REPLICA_DEPLOYMENT, ApplicationArgs
from modelfleet_serving.replica import Replica

SHUTDOWN_MARGIN_SECONDS: Final = 60.0
"""Over the drain time: for the routers to take over the table and for the engine to end."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one (model, variant, revision).

    Raises:
        ValueError: the arguments are wrong; the message says where.
    """
    settings = parse_args(args)
    deployment = serve.deployment(
        Replica,
        name=REPLICA_DEPLOYMENT,
        ray_actor_options=actor_options(settings),
        max_ongoing_requests=8,  # nobody calls it through Serve
        graceful_shutdown_timeout_s=settings.drain_timeout_seconds + SHUTDOWN_MARGIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    return deployment.bind(settings)


def parse_args(args: dict[str, Any]) -> ApplicationArgs:
    """The arguments, checked.

    Raises:
        ValueError: a field is missing or of the wrong type, or there is no such engine.
    """
    try:
        settings = msgspec.convert(args, ApplicationArgs)
    except msgspec.ValidationError as error:
        raise ValueError(f"arguments of the application: {error}") from error
    engines.get(settings.engine.type)
    return settings


def actor_options(args: ApplicationArgs) -> dict[str, Any]:
    """What Ray reserves for a replica."""
    reserve = args.resources
    options: dict[str, Any] = {"num_cpus": reserve.num_cpus, "num_gpus": reserve.num_gpus}
    if reserve.resources:
        options["resources"] = dict(reserve.resources)
    if reserve.accelerator_type is not None:
        options["accelerator_type"] = reserve.accelerator_type
    return options
