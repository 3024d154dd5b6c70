"""The writer of statuses: what goes first, and that the newest state is what stands there in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import pytest
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from modelfleet_operator.api import FINALIZER
from modelfleet_operator.clients.errors import UnavailableError
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, ForbiddenError, Kind, KubeClient, Object
from modelfleet_operator.events import EventWriter
from modelfleet_operator.writer import WORKERS, Address, Compose, ObjectWriter


class Api(KubeClient):
    """Takes everything; a write waits while its object is in ``slow``."""

    def __init__(self) -> None:
        super().__init__(ApiClient(Configuration()))
        self.written: list[tuple[str, str]] = []
        self.status: dict[str, dict[str, Any]] = {}
        self.slow: dict[str, asyncio.Event] = {}
        self.errors: list[Exception] = []
        """Answers to the next writes."""
        self.busy: set[str] = set()

    async def apply(self, kind: Kind, body: Mapping[str, Any], *, subresource: str = "") -> Object:
        name = body["metadata"]["name"]
        assert name not in self.busy, "two writes of one object at once"
        self.busy.add(name)
        if (gate := self.slow.get(name)) is not None:
            await gate.wait()
        await asyncio.sleep(0)
        self.busy.discard(name)
        if self.errors:
            raise self.errors.pop()
        self.written.append((name, subresource))
        if subresource:
            self.status[name] = body["status"]
        return dict(body)

    async def create(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        return dict(body)


def address(name: str) -> Address:
    return (MODEL_DEPLOYMENT, "default", name)


def status(text: str) -> Compose:
    return lambda _now, _before: {"ready": text}


class Running:
    """A writer at work."""

    def __init__(self, *names: str, finalizer: bool = True) -> None:
        self.api = Api()
        self.writer = ObjectWriter(self.api, EventWriter(self.api, "test"))
        for name in names:
            metadata = {"namespace": "default", "name": name, "uid": f"uid-{name}"}
            finalizers = {"finalizers": [FINALIZER]} if finalizer else {}
            self.writer.saw(MODEL_DEPLOYMENT, {"metadata": metadata | finalizers})

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.writer.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def until(self, name: str, text: str) -> None:
        async with asyncio.timeout(5):
            while self.api.status.get(name) != {"ready": text}:  # noqa: ASYNC110
                await asyncio.sleep(0)


async def test_what_will_be_overtaken_waits_for_what_will_not() -> None:
    many = [f"m{n}" for n in range(4 * WORKERS)]
    running = Running(*many, finalizer=False)
    for name in many:
        running.writer.set_status(address(name), status("passing"), passing=True)
    for name in many[: 2 * WORKERS]:
        running.writer.set_status(address(name), status("final"))
    async with running:
        await running.until(many[-1], "passing")
    order = [name for name, subresource in running.api.written if subresource]
    assert sorted(order[: 2 * WORKERS]) == sorted(many[: 2 * WORKERS])
    assert len(order) == len(many), "one status each"
    # Finalizers hold an object from the first moment on: they wait for no status that is to be overtaken.
    first_passing = running.api.written.index((many[-1], "status"))
    assert all(running.api.written.index((name, "")) < first_passing for name in many)


async def test_the_newest_state_stands_there_however_long_a_write_takes() -> None:
    async with Running("m") as running:
        gate = running.api.slow["m"] = asyncio.Event()
        running.writer.set_status(address("m"), status("old"))
        async with asyncio.timeout(5):
            while not running.api.busy:  # noqa: ASYNC110
                await asyncio.sleep(0)
        running.writer.set_status(address("m"), status("new"))
        for _ in range(10):
            await asyncio.sleep(0)  # another worker would take it up now
        gate.set()
        await running.until("m", "new")
        assert [s for _, s in running.api.written] == ["status", "status"]


async def test_a_state_that_stays_is_written_though_it_was_to_be_overtaken() -> None:
    async with Running("m") as running:
        running.writer.set_status(address("m"), status("passing"), passing=True)
        await running.until("m", "passing")


@pytest.mark.parametrize("error", [ForbiddenError("no role is known yet"), UnavailableError("429")])
async def test_a_refusal_that_passes_loses_no_status(error: Exception) -> None:
    async with Running("m", finalizer=False) as running:
        running.api.errors = [error]
        running.writer.set_status(address("m"), status("said"))
        await running.until("m", "said")
        assert running.api.written == [("m", ""), ("m", "status")]
