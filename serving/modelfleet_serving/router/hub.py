"""The one place of a router, however many workers it has: table, rows, metrics and demand meet here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Final, Protocol

import msgspec

from modelfleet_serving.contract import DemandReply, DemandReport, ModelDemand, ModelRoute, TableUpdate
from modelfleet_serving.router import metrics
from modelfleet_serving.router.checks import TableCheck
from modelfleet_serving.router.counters import Counters, RowAllocator
from modelfleet_serving.router.observe import Snapshot, VariantStats, merge
from modelfleet_serving.router.shared_limits import SharedLimits
from modelfleet_serving.router.slices import Slices
from modelfleet_serving.router.table import endpoint_key, model_keys

_log = logging.getLogger(__name__)


_PART_MODELS: Final = 50
"""Models of one part of a change: what a worker decodes without looking up."""


class TableChange(msgspec.Struct, kw_only=True):
    """What a worker has to take over, or a part of it.

    Attributes:
        models: models that changed.
        removed: names of models that are gone.
        rows: the counter rows of the models that changed.
        more: another part follows; names come into effect with the last one.
    """

    models: list[ModelRoute] = []
    removed: list[str] = []
    rows: dict[str, int] = {}
    more: bool = False


class Link(Protocol):
    """The hub's way to one worker."""

    async def change(self, change: TableChange) -> None:
        """Returns once the worker routes by the new table."""

    async def snapshot(self) -> Snapshot:
        """What the worker has counted."""


class Hub:
    """Keeps the table that all workers route by, and adds up what they count."""

    def __init__(self, counters: Counters, router_id: str) -> None:
        self.counters = counters
        self.rows = RowAllocator(counters.total)
        self.links: list[Link] = []
        self.epoch = ""
        self.version = 0
        self.loaded = asyncio.Event()
        self._router_id = router_id
        self._models: dict[str, ModelRoute] = {}
        self._rows: dict[str, list[tuple[str, list[int]]]] = {}
        self._retired = Snapshot()
        self._last: dict[Link, Snapshot] = {}
        self._reported: dict[tuple[str, str], VariantStats] = {}
        self._limits = SharedLimits(counters.tenants)
        self._lock = asyncio.Lock()

    async def apply(self, update: TableUpdate) -> None:
        """Gives every worker what an update changes. A model that can't be used stays as it was."""
        async with self._lock:
            models, removed = await self._difference(update)
            if models or removed or not self.loaded.is_set():
                async for part in self._parts(models, removed):
                    await asyncio.gather(*(link.change(part) for link in self.links))
                    self.rows.collect()
            self.epoch, self.version = update.epoch, update.version
            self.loaded.set()

    async def _difference(self, update: TableUpdate) -> tuple[list[ModelRoute], list[str]]:
        """Models that changed and can be used, and names of models that are gone."""
        slices = Slices()
        known = self._models
        models: list[ModelRoute] = []
        for model in update.models:
            await slices.pause()
            if known.get(model.name) == model:
                continue
            faults = TableCheck().faults(model)
            if faults:
                _log.error("the routes of %r stay as they were: %s", model.name, "; ".join(faults))
                continue
            models.append(model)
        if update.full:
            names = {model.name for model in update.models}
            removed = [name for name in known if name not in names]
        else:
            removed = [name for name in update.removed if name in known]
        return models, removed

    async def _parts(self, models: list[ModelRoute], removed: list[str]) -> AsyncIterator[TableChange]:
        """Keeps the models, and makes of them what workers are told."""
        slices = Slices()
        for name in removed:
            await slices.pause()
            self._rows.pop(name, None)
            for key in model_keys(self._models.pop(name)):
                self.rows.release(key)
        for start in range(0, max(1, len(models)), _PART_MODELS):
            slices = Slices()
            part = TableChange(models=models[start : start + _PART_MODELS])
            for model in part.models:
                await slices.pause()
                self._assign(model, part.rows)
            part.more = start + _PART_MODELS < len(models)
            if not part.more:
                part.removed = removed
            yield part

    def _assign(self, model: ModelRoute, rows: dict[str, int]) -> None:
        old = self._models.get(model.name)
        keys = model_keys(model)
        if old is not None:
            for key in set(model_keys(old)).difference(keys):
                self.rows.release(key)
        for key in keys:
            rows[key] = self.rows.row(key)
        self._models[model.name] = model
        self._rows[model.name] = [
            (variant.name, [rows[endpoint_key(variant.name, model.name, ref)] for ref in variant.endpoints])
            for variant in model.variants
        ]

    # --- Workers come and go ---

    async def join(self, link: Link) -> None:
        """Adds a worker, with the table as it stands."""
        async with self._lock:
            if self.loaded.is_set():
                async for part in self._parts(list(self._models.values()), []):
                    await link.change(part)
            self.links.append(link)

    def leave(self, link: Link) -> None:
        """Drops a worker; what it had counted stays in the totals."""
        if link in self.links:
            self.links.remove(link)
        last = self._last.pop(link, None)
        if last is not None:
            for stats in last.variants:
                stats.queued = 0
            last.connections = last.active = 0
            self._retired = merge((self._retired, last))

    # --- Figures ---

    async def snapshot(self) -> Snapshot:
        """The sum over all workers, those that ended included."""
        taken = await asyncio.gather(*(self._ask(link) for link in self.links))
        return merge([self._retired, *taken])

    async def _ask(self, link: Link) -> Snapshot:
        try:
            async with asyncio.timeout(2.0):
                self._last[link] = await link.snapshot()
        except (TimeoutError, ConnectionError):
            _log.warning("a worker did not report its figures in time")
        return self._last.get(link) or Snapshot()

    def in_flight(self) -> list[tuple[str, str, int]]:
        """Requests at engines, by model and variant."""
        total = self.counters.total
        return [
            (model, variant, sum(map(total, rows)))
            for model, variants in self._rows.items()
            for variant, rows in variants
        ]

    async def metrics(self) -> bytes:
        """The answer to a scrape."""
        return metrics.render(await self.snapshot(), self.in_flight(), len(self.links))

    async def demand(self, interval: float, now: float) -> DemandReport:
        """The report since the last one; monotonic seconds."""
        snapshot = await self.snapshot()
        running = {(model, variant): number for model, variant, number in self.in_flight()}
        models: list[ModelDemand] = []
        reported: dict[tuple[str, str], VariantStats] = {}
        for stats in snapshot.variants:
            key = (stats.model, stats.variant)
            if stats.model not in self._models:
                continue
            before = self._reported.get(key) or VariantStats(model=stats.model, variant=stats.variant)
            reported[key] = stats
            models.append(_demand(stats, before, running.get(key, 0)))
        self._reported = reported
        return DemandReport(
            router=self._router_id,
            epoch=self.epoch,
            version=self.version,
            interval_seconds=interval,
            models=models,
            tenants=self._limits.report(now),
        )

    def answered(self, reply: DemandReply, now: float) -> None:
        """Takes over what the registry says of the other routers; monotonic seconds."""
        self.counters.routers[0] = reply.routers
        self._limits.adopt(reply.tenants, now)


def _demand(stats: VariantStats, before: VariantStats, in_flight: int) -> ModelDemand:
    answered = stats.first_byte.count - before.first_byte.count
    return ModelDemand(
        model=stats.model,
        variant=stats.variant,
        in_flight=in_flight,
        queued=stats.queued,
        requests=stats.requests - before.requests,
        failures=stats.failures - before.failures,
        time_to_first_byte_seconds=(stats.first_byte.sum - before.first_byte.sum) / answered
        if answered
        else None,
    )
