"""Lists and events of the API server: what is taken in, and what is newer already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, Kind, Object
from modelfleet_operator.fleet import Fleet
from modelfleet_operator.pools import Tools
from modelfleet_operator.settings import Settings


def body(name: str, version: int, uid: str = "u", length: int = 1) -> Object:
    spec = {"model": {"source": "hf://o/n"}, "engine": {"maxModelLen": length}, "variants": [{"name": "a"}]}
    metadata = {
        "name": name, "namespace": "n", "uid": uid, "resourceVersion": str(version), "generation": version,
    }  # fmt: skip
    return {
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": metadata, "spec": spec,
    }  # fmt: skip


class Kube:
    """Lists what it is told to; ``meanwhile`` happens while the answer is on its way."""

    def __init__(self) -> None:
        self.deployments: list[Object] = []
        self.meanwhile: Callable[[], None] = lambda: None

    async def list(self, kind: Kind, namespace: str | None = None) -> list[Object]:
        if kind is not MODEL_DEPLOYMENT:
            return []
        found = list(self.deployments)
        self.meanwhile()
        return found


class Writer:
    """Keeps what it was shown last."""

    def __init__(self) -> None:
        self.seen: dict[str, Object] = {}

    def saw(self, kind: Kind, body: Object, *, authoritative: bool = False) -> None:
        self.seen[body["metadata"]["name"]] = body

    def set_status(self, address: Any, compose: Any, **_: Any) -> None:
        pass

    def forget(self, address: tuple[Kind, str, str]) -> None:
        self.seen.pop(address[2], None)

    def length(self, name: str = "m") -> int:
        found: int = self.seen[name]["spec"]["engine"]["maxModelLen"]
        return found


def fleet() -> tuple[Fleet, Kube, Writer]:
    kube, writer = Kube(), Writer()
    tools: Any = Tools(kube, None, None, writer, Settings())  # type: ignore[arg-type]
    return Fleet(tools), kube, writer


async def test_what_was_created_while_a_list_was_on_its_way_is_kept() -> None:
    work, kube, writer = fleet()
    await work.sync()
    kube.meanwhile = lambda: work.saw_deployment("ADDED", body("m", 5))
    await work.sync()
    assert writer.length() == 1
    kube.meanwhile = lambda: None
    await work.sync()
    assert not writer.seen, "gone by the next list"


async def test_a_list_does_not_undo_what_was_seen_since() -> None:
    work, kube, writer = fleet()
    kube.deployments = [body("m", 5, length=5)]
    await work.sync()
    kube.meanwhile = lambda: work.saw_deployment("MODIFIED", body("m", 6, uid="new", length=6))
    await work.sync()
    assert writer.length() == 6


async def test_a_list_counts_where_versions_went_back() -> None:
    work, kube, writer = fleet()
    kube.deployments = [body("m", 9000, length=9)]
    await work.sync()
    work.saw_deployment("MODIFIED", body("m", 10, length=1))
    assert writer.length() == 9, "an event that came late"
    kube.deployments = [body("m", 12, length=2)]
    await work.sync()
    assert writer.length() == 2, "an etcd was restored"


async def test_one_that_can_not_be_taken_in_keeps_no_other_out() -> None:
    work, kube, writer = fleet()
    broken = body("odd", 1)
    del broken["metadata"]["uid"]
    kube.deployments = [broken, body("m", 2)]
    await work.sync()
    assert writer.length() == 1
