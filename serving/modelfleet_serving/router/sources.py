"""Where the route table comes from: a file that is reread, or the registry's long poll."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
import yaml

from modelfleet_serving.contract import DemandReply, DemandReport, ModelRoute, RouteTable, TableUpdate, Wire
from modelfleet_serving.router.checks import TableCheck
from modelfleet_serving.router.hub import Hub
from modelfleet_serving.router.slices import Slices
from modelfleet_serving.router.table import TableError

_log = logging.getLogger(__name__)

Apply = Callable[[TableUpdate], Awaitable[None]]
POLL_SECONDS: Final = 0.25
LONG_POLL_SECONDS: Final = 30.0
DEMAND_SECONDS: Final = 1.0
_MAX_BACKOFF_SECONDS: Final = 1.0
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_decode_model: Final = msgspec.json.Decoder(ModelRoute).decode


class _RawTable(Wire, kw_only=True, frozen=True):
    """A table file whose models are read one by one."""

    models: list[msgspec.Raw] = []


class _RawUpdate(Wire, kw_only=True, frozen=True):
    """A ``TableUpdate`` whose models are read one by one."""

    epoch: str
    version: int
    full: bool
    models: list[msgspec.Raw] = []
    removed: list[str] = []


async def load_table(path: Path) -> list[ModelRoute]:
    """Reads and checks a route table, while requests pass.

    Raises:
        TableError: with the file, the place in it and what is wrong there.
    """
    try:
        text = await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            # In a thread: only JSON can be split before it is read, and a large table is JSON.
            models = await asyncio.to_thread(_read_yaml, text)
        else:
            models = await _decode_models(msgspec.json.decode(text, type=_RawTable).models)
    except (msgspec.MsgspecError, yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date that is none, bytes that are no text.
        raise TableError(f"{path}: {error}") from error
    faults: list[str] = []
    check = TableCheck()
    slices = Slices()
    for model in models:
        faults += check.faults(model)
        await slices.pause()
    if faults:
        raise TableError(f"{path}: " + "; ".join(faults))
    return models


def _read_yaml(text: bytes) -> list[ModelRoute]:
    return msgspec.convert(yaml.load(text, Loader=_LOADER), RouteTable).models  # noqa: S506 - a safe loader


async def _decode_models(models: list[msgspec.Raw]) -> list[ModelRoute]:
    """Reads models while requests pass; a decoder lets nobody else run before it is through.

    Raises:
        msgspec.DecodeError: with the place in the whole message.
    """
    slices = Slices()
    decoded: list[ModelRoute] = []
    for index, raw in enumerate(models):
        try:
            decoded.append(_decode_model(raw))
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(_placed(str(error), f"$.models[{index}]")) from error
        await slices.pause()
    return decoded


def _placed(message: str, place: str) -> str:
    """A message of msgspec with the place of what it read put before the place in it."""
    text, at, path = message.rpartition(" - at `$")
    return f"{text} - at `{place}{path}" if at else f"{message} - at `{place}`"


class FileSource:
    """Watches a route table file. A bad file changes nothing: the last good table stays."""

    def __init__(self, path: Path, apply: Apply) -> None:
        self._path = path
        self._apply = apply
        self._seen: tuple[int, int, int] | None = None
        self._version = 0

    async def start(self) -> None:
        """Reads the file for the first time.

        Raises:
            TableError: when there is no table to start with.
        """
        self._seen = self._stamp()
        await self._load()

    async def run(self) -> None:
        """Rereads the file whenever it has changed and is not just being written."""
        last = self._seen
        while True:
            await asyncio.sleep(POLL_SECONDS)
            before, last = last, self._stamp()
            # The half of a YAML file that is written already is often valid, and half of the models.
            if last == self._seen or last != before:
                continue
            self._seen = last
            try:
                await self._load()
            except TableError as error:
                _log.error("the route table stays as it was: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    async def _load(self) -> None:
        models = await load_table(self._path)
        self._version += 1
        await self._apply(TableUpdate(epoch="file", version=self._version, full=True, models=models))
        endpoints = sum(len(variant.endpoints) for model in models for variant in model.variants)
        _log.info("route table %d: %d models, %d endpoints", self._version, len(models), endpoints)


class RegistrySource:
    """Long-polls the registry, and reports demand to it. While it is away the last good table stays."""

    def __init__(self, url: str, token_file: Path | None, router_id: str, hub: Hub) -> None:
        self._url = url.rstrip("/")
        self._token_file = token_file
        self._router_id = router_id
        self._hub = hub
        self._epoch = ""
        self._version = 0

    async def start(self) -> None:
        """Nothing to wait for: a router without a table yet listens and says that it isn't ready."""

    async def run(self) -> None:
        """Polls and reports until cancelled."""
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            group.create_task(self._follow(session))
            group.create_task(self._report(session))

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        return {"authorization": "Bearer " + self._token_file.read_text().strip()}

    async def _follow(self, session: aiohttp.ClientSession) -> None:
        backoff = 0.1
        while True:
            try:
                update = await self._poll(session)
                if backoff > 0.1:
                    _log.info("the registry answers again")
                backoff = 0.1
            except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, ValueError) as error:
                reason = str(error) or type(error).__name__
                _log.warning("registry %s: %s; the last table stays", self._url, reason)
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spread, no secret
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)
                continue
            if update is not None:
                await self._hub.apply(update)
                self._epoch, self._version = update.epoch, update.version

    async def _poll(self, session: aiohttp.ClientSession) -> TableUpdate | None:
        query = {
            "epoch": self._epoch,
            "version": str(self._version),
            "timeout": f"{LONG_POLL_SECONDS:g}",
            "router": self._router_id,
        }
        limit = aiohttp.ClientTimeout(total=LONG_POLL_SECONDS + 15, sock_connect=5)
        url = self._url + "/v1/table"
        async with session.get(url, params=query, headers=self._headers(), timeout=limit) as answer:
            if answer.status == 304:
                return None
            if answer.status != 200:
                raise aiohttp.ClientError(f"answered {answer.status}: {(await answer.text())[:200]}")
            raw = msgspec.json.decode(await answer.read(), type=_RawUpdate)
        return TableUpdate(
            epoch=raw.epoch,
            version=raw.version,
            full=raw.full,
            models=await _decode_models(raw.models),
            removed=raw.removed,
        )

    async def _report(self, session: aiohttp.ClientSession) -> None:
        """Sends demand every second; a report that fails is not sent again, the next one says more."""
        failing = False
        while True:
            await asyncio.sleep(DEMAND_SECONDS)
            report = await self._hub.demand(DEMAND_SECONDS, time.monotonic())
            try:
                self._hub.answered(await self._send(session, report), time.monotonic())
                failing = False
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                if not failing:
                    _log.warning("demand is not reported: %s", str(error) or type(error).__name__)
                failing = True

    async def _send(self, session: aiohttp.ClientSession, report: DemandReport) -> DemandReply:
        body = msgspec.json.encode(report)
        headers = {"content-type": "application/json", **self._headers()}
        limit = aiohttp.ClientTimeout(total=5)
        async with session.post(
            self._url + "/v1/demand", data=body, headers=headers, timeout=limit
        ) as answer:
            if answer.status >= 300:
                raise aiohttp.ClientError(f"answered {answer.status}")
            body = await answer.read()
        # A registry of an older release has nothing to say.
        return msgspec.json.decode(body, type=DemandReply) if body else DemandReply()
