"""Applying the CRDs: an API server takes a moment to establish them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from modelfleet_operator import crds_command
from modelfleet_operator.clients.errors import UnavailableError
from modelfleet_operator.clients.kube import KubeClient
from modelfleet_operator.crds_command import _established


class ApiServer:
    """Shows a definition as it is at each look; the last look stays."""

    def __init__(self, *statuses: dict[str, Any]) -> None:
        self.statuses = list(statuses)

    async def call(self, method: str, path: str) -> dict[str, Any]:
        assert (method, path.rpartition("/")[2]) == ("GET", "x.modelfleet.io")
        found = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return {"metadata": {"name": "x.modelfleet.io"}, **found}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crds_command, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(crds_command, "ESTABLISH_SECONDS", 0.1)


def _status(value: str) -> dict[str, Any]:
    return {"status": {"conditions": [{"type": "Established", "status": value}]}}


async def test_waits_from_the_first_moment_on() -> None:
    server = ApiServer(
        {}, {"status": {"conditions": None}}, {"status": {}}, _status("False"), _status("True")
    )
    await _established(cast("KubeClient", server), "x.modelfleet.io")
    assert len(server.statuses) == 1


async def test_says_what_is_not_established() -> None:
    with pytest.raises(UnavailableError, match=r"x\.modelfleet\.io is not established"):
        await _established(cast("KubeClient", ApiServer(_status("False"))), "x.modelfleet.io")
