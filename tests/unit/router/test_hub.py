"""What the hub tells workers about a table that changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from modelfleet_serving.contract import Endpoint, ModelRoute, TableUpdate, VariantRoute
from modelfleet_serving.router.counters import Counters
from modelfleet_serving.router.hub import Hub, TableChange
from modelfleet_serving.router.observe import Snapshot


@dataclass
class Link:
    """A worker that remembers what it is told. It takes its time, as a process does."""

    told: list[TableChange] = field(default_factory=list)

    async def change(self, change: TableChange) -> None:
        """Notes a part."""
        await asyncio.sleep(0)
        self.told.append(change)

    async def snapshot(self) -> Snapshot:
        """Nothing was counted."""
        return Snapshot()


def _routes(count: int, version: int = 1) -> list[ModelRoute]:
    return [
        ModelRoute(
            name=f"m{number}",
            variants=[
                VariantRoute(
                    name="v", endpoints=[Endpoint(id=f"r{version}", url=f"http://127.0.0.1:{1 + number}")]
                )
            ],
        )
        for number in range(count)
    ]


def _update(models: list[ModelRoute], version: int) -> TableUpdate:
    return TableUpdate(epoch="e", version=version, full=True, models=models)


def _check(parts: list[TableChange], names: list[str]) -> None:
    """Names come into effect once, at the end, and each model comes with the rows of its counters."""
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert [model.name for part in parts for model in part.models] == names
    for part in parts:
        assert all(any(f" {model.name} " in key for key in part.rows) for model in part.models)


async def test_a_large_table_reaches_a_worker_in_parts() -> None:
    hub, link = Hub(Counters(), "test"), Link()
    await hub.join(link)
    assert not link.told  # nothing is known yet
    await hub.apply(_update(_routes(230), 1))
    names = [f"m{number}" for number in range(230)]
    assert max(len(part.models) for part in link.told) <= 50
    _check(link.told, names)
    late = Link()
    await hub.join(late)  # a worker that was started again
    _check(late.told, names)
    assert late.told[0].rows == link.told[0].rows


async def test_an_empty_table_and_one_without_models_left_are_told() -> None:
    hub, link = Hub(Counters(), "test"), Link()
    await hub.join(link)
    await hub.apply(_update([], 1))
    assert [(part.models, part.removed, part.more) for part in link.told] == [([], [], False)]
    await hub.apply(_update(_routes(60), 2))
    link.told.clear()
    await hub.apply(_update(_routes(60), 3))
    assert not link.told  # nothing changed
    await hub.apply(_update([], 4))
    assert [(part.models, len(part.removed), part.more) for part in link.told] == [([], 60, False)]


async def test_rows_of_what_is_gone_come_back() -> None:
    hub = Hub(Counters(), "test")
    await hub.join(Link())
    free = len(hub.rows._free)
    for version in range(1, 40):
        await hub.apply(_update(_routes(300, version), version))
    await hub.apply(_update([], 40))
    assert len(hub.rows._free) == free
