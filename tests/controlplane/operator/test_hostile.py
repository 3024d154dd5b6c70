"""Objects of one team that could end the work on all others."""

from __future__ import annotations

import base64

import pytest
from tests.controlplane.bed import CommandError
from tests.controlplane.operator.processes import OperatorProcess
from tests.controlplane.operator.world import World, deployment

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(120)]

NO_TOKENS = {"binary": b"\xff\xfe", "lines": b"two\nlines", "letters": "\u00e9".encode(), "empty": b""}


def test_secrets_and_addresses_that_are_none(world: World, operator: OperatorProcess) -> None:
    data = {key: base64.b64encode(value).decode() for key, value in NO_TOKENS.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "no-tokens"}, "data": data}
    world.cluster.apply(secret, namespace=world.namespace)
    for number, key in enumerate([*NO_TOKENS, "missing"]):
        token = {"name": "no-tokens", "key": key}
        world.make_pool(key, ray={"address": f"http://127.0.0.1:{number + 1}", "authToken": token})
    for address in ("http://[::1", "http://:::"):
        with pytest.raises(CommandError, match="must be a URL"):
            world.make_pool("address", ray={"address": address})
    for key in NO_TOKENS:
        found = world.wait_condition("Ready", "False", key, reason="TokenUnreadable", resource="spool")
        assert f"{key} is no token" in found
    found = world.wait_condition("Ready", "False", "missing", reason="TokenUnreadable", resource="spool")
    assert "no-tokens has no key missing" in found
    world.apply(deployment())
    world.wait_condition("Ready")
    assert "Traceback" not in operator.text()


def test_one_cluster_written_in_two_ways(world: World, operator: OperatorProcess) -> None:
    world.apply(deployment())
    world.wait_condition("Ready")
    world.make_pool("twin", ray={"address": f"{world.ray.url}/".replace("http", "HTTP", 1).lower()})
    world.wait_condition("Accepted", "False", "twin", reason="ClusterInUse", resource="spool")
    assert len(world.ray.names()) == 2
