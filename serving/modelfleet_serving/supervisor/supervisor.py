"""Runs the state machine of :mod:`.state` against a real engine and the registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from modelfleet_serving import engines
from modelfleet_serving.contract import (
    ApplicationArgs,
    EndpointState,
    EngineLoad,
    EngineMemory,
    Heartbeat,
    HeartbeatReply,
    ReplicaConfig,
)
from modelfleet_serving.engines import EngineAdapter
from modelfleet_serving.supervisor.adapters import Adapters
from modelfleet_serving.supervisor.engine_process import (
    EngineProcess,
    LaunchError,
    free_port,
    scrub,
    secrets_of,
)
from modelfleet_serving.supervisor.failures import classify, describe
from modelfleet_serving.supervisor.gpu_turn import GpuTurn
from modelfleet_serving.supervisor.heartbeat import HeartbeatSender
from modelfleet_serving.supervisor.launch import Start, UnlaunchableError, prepare
from modelfleet_serving.supervisor.probes import EngineClient
from modelfleet_serving.supervisor.state import (
    Action,
    Alive,
    Answers,
    Event,
    Failed,
    Launched,
    Left,
    Limits,
    Load,
    Phase,
    State,
    Stop,
    Tick,
    begin,
    step,
)

_log = logging.getLogger(__name__)

PROBE_FIRST_SECONDS: Final = 0.1
PROBE_MOST_SECONDS: Final = 1.0
DRAIN_POLL_SECONDS: Final = 0.25
LEAVE_POLL_SECONDS: Final = 0.1
LIVENESS_SECONDS: Final = 5.0
FIRST_ADAPTERS_SECONDS: Final = 60.0
"""So long a ready engine waits for its adapters before it takes requests without them."""
KILL_GRACE_SECONDS: Final = 1.0


@dataclass
class _Leave:
    """From which heartbeat on the registry knows that we leave, and which table says so."""

    sequence: int
    epoch: str = ""
    version: int = 0

    def is_confirmed(self, sequence: int, reply: HeartbeatReply) -> bool:
        if sequence < self.sequence:
            return False
        if reply.epoch != self.epoch or not self.version:
            self.epoch, self.version = reply.epoch, reply.table_version
        return reply.confirmed_version >= self.version


@dataclass
class Supervisor:
    """Keeps the engine of one replica.

    Attributes:
        args: what to run.
        replica: id of this replica, unique for its life.
        host: address that the engine listens on, and under which routers reach it.
        log: file for the engine's output.
        node: where this is, for people.
        limits: times; ``None`` takes them from ``args``.
        environ: what the engine inherits.
    """

    args: ApplicationArgs
    replica: str
    host: str
    log: Path
    node: str = ""
    limits: Limits | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    adapter: EngineAdapter = field(init=False)

    def __post_init__(self) -> None:
        self.adapter = engines.get(self.args.engine.type)
        self._limits = self.limits or Limits(
            start=self.args.start_timeout_seconds,
            drain=self.args.drain_timeout_seconds,
            end=self.adapter.drain.grace_seconds,
        )
        self.state = State()
        self.fault = ""
        """Why this supervisor itself is of no use any more."""
        self._events: asyncio.Queue[Event] = asyncio.Queue(maxsize=1024)
        self._sender = HeartbeatSender(self.args.registry, self.replica, self._compose, self._on_reply)
        self._adapters = Adapters(self.adapter, self.environ, self._sender.send_now)
        self._secrets = secrets_of(self.environ, self.args.engine.env)
        self._capacity = self.adapter.capacity(self.args.engine)
        self._process: EngineProcess | None = None
        self._life: asyncio.Task[None] | None = None
        self._url = ""
        self._load = EngineLoad()
        self._memory: EngineMemory | None = None
        self._leave: _Leave | None = None
        self._stopping = asyncio.Event()
        self._turn = GpuTurn.of(self.args.resources.num_gpus, self.environ)
        self._gone = asyncio.Event()

    @property
    def hopeless(self) -> bool:
        """Whether the engine fails again and again on this node."""
        return self.state.hopeless(self._limits)

    async def run(self) -> None:
        """Keep the engine until :meth:`stop`; cancelling ends it without a drain."""
        sending: asyncio.Task[None] | None = None
        try:
            self.state, actions = begin(time.monotonic())
            self._perform(actions)
            sending = asyncio.create_task(self._sender.run(), name="heartbeats")
            sending.add_done_callback(self._heartbeats_ended)
            while self.state.phase is not Phase.GONE:
                event = await self._next_event()
                self._advance(event)
            await self._cancel(sending)  # it must not race with the goodbye
            await self._sender.send_last()
        finally:
            await self._cancel(sending, self._life)
            self._gone.set()

    def _heartbeats_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: heartbeats ended", self.replica, exc_info=error)
            self.fault = f"heartbeats ended: {error!r}"

    @staticmethod
    async def _cancel(*tasks: asyncio.Task[None] | None) -> None:
        there = [task for task in tasks if task is not None]
        for task in there:
            task.cancel()
        await asyncio.gather(*there, return_exceptions=True)

    def configure(self, config: ReplicaConfig) -> None:
        """Take over what may change while the engine runs."""
        self._adapters.want(config.adapters)

    async def stop(self) -> None:
        """Drain, end the engine, say goodbye; returns when nothing of it is left."""
        self._stopping.set()
        self._events.put_nowait(Stop())
        await self._gone.wait()

    # --- the machine -----------------------------------------------------------------------------

    async def _next_event(self) -> Event:
        deadline = self.state.deadline
        if deadline is None:
            return await self._events.get()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    def _advance(self, event: Event) -> None:
        before = self.state
        self.state, actions = step(before, event, time.monotonic(), self._limits)
        if self.state.phase is not before.phase:
            self._note(before)
        if self.state.phase is Phase.LEAVING and before.phase is not Phase.LEAVING:
            self._leave = _Leave(self._sender.next_sequence)
            self._sender.hurry(LEAVE_POLL_SECONDS)
        elif before.phase is Phase.LEAVING and self.state.phase is not Phase.LEAVING:
            self._sender.hurry(None)
        self._perform(actions)

    def _note(self, before: State) -> None:
        level = logging.WARNING if self.state.phase is Phase.BACKOFF else logging.INFO
        what = f"{self.state.reason}: {self.state.message}" if self.state.reason else ""
        _log.log(level, "%s: %s -> %s %s", self.replica, before.phase.value, self.state.phase.value, what)

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Action.LAUNCH:
                    self._life = asyncio.create_task(self._live(), name="engine")
                case Action.TERMINATE if self._process is not None:
                    self._process.send(self.adapter.drain.signal)
                case Action.KILL if self._process is not None:
                    self._process.end(KILL_GRACE_SECONDS)
                case Action.REPORT:
                    self._sender.send_now()

    # --- one life of the engine ------------------------------------------------------------------

    async def _live(self) -> None:
        """From the launch to the end; always tells how it ended."""
        try:
            await self._live_once()
        finally:
            self._turn.give_back()

    async def _live_once(self) -> None:
        try:
            start, process = await self._launch()
        except UnlaunchableError as error:
            self._fail(error.reason, str(error))
            return
        except (LaunchError, OSError) as error:
            self._fail("LaunchFailed", str(error))
            return
        self._events.put_nowait(Launched())
        watching = asyncio.create_task(self._watch(start, process), name="watch")
        try:
            end = await process.wait()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await process.release()
        lines = await asyncio.to_thread(process.tail)
        self._load = EngineLoad()
        self._fail(classify(end, lines), describe(f"the engine ended ({end})", lines))

    async def _launch(self) -> tuple[Start, EngineProcess]:
        port = free_port(self.host)
        start = await asyncio.to_thread(prepare, self.args, self.adapter, self.host, port, self.environ)
        # Not before: copying weights may take long, and needs no GPU.
        if not await self._turn.take(self._limits.start, self._stopping):
            raise UnlaunchableError("Stopped", "told to stop while another engine was starting on this GPU")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        process = EngineProcess(self.log)
        await process.start(start.command, start.environment, self.log.parent)
        self._process, self._url, self._memory = process, start.url, None
        self._adapters.forget()
        return start, process

    def _fail(self, reason: str, message: str) -> None:
        jitter = random.uniform(0.5, 1.0)  # noqa: S311  spread, no secret
        self._events.put_nowait(Failed(reason, scrub(message, self._secrets), jitter))

    async def _watch(self, start: Start, process: EngineProcess) -> None:
        """Wait for readiness, then follow the engine's health and load."""
        try:
            async with aiohttp.ClientSession() as session:
                client = EngineClient(session, start.url, self.adapter)
                await self._until_ready(client, process, urlsplit(start.url).port or 0)
                self._turn.give_back()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FIRST_ADAPTERS_SECONDS):
                        await self._adapters.update(client)
                self._events.put_nowait(Answers())
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._adapters.keep(client), name="adapters")
                    group.create_task(self._follow(client), name="follow")
        except Exception:  # noqa: BLE001  logged, and acted upon
            # Without its eyes the supervisor would trust an engine for ever.
            _log.exception("%s: the watch over the engine failed; the engine is restarted", self.replica)
            process.end(KILL_GRACE_SECONDS)

    async def _until_ready(self, client: EngineClient, process: EngineProcess, port: int) -> None:
        pause = PROBE_FIRST_SECONDS
        memory = EngineMemory()
        while True:
            for line in await asyncio.to_thread(process.new_lines):
                memory = self.adapter.read_log(line, memory)
            if memory != EngineMemory():
                self._memory = memory
            if not await client.check(self.adapter.readiness) and await asyncio.to_thread(
                process.owns_port, port
            ):
                return
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, PROBE_MOST_SECONDS)

    async def _follow(self, client: EngineClient) -> None:
        checked = time.monotonic()
        while True:
            draining = self.state.phase is Phase.DRAINING
            if (load := await client.load()) is not None:
                self._load = load
                if draining:  # a reading from before the routers left proves nothing
                    self._events.put_nowait(Load(load.running + load.waiting))
            if self.state.phase is Phase.READY and time.monotonic() - checked >= LIVENESS_SECONDS:
                trouble = await client.check(self.adapter.liveness)
                checked = time.monotonic()
                if trouble or self.state.liveness_failures:
                    self._events.put_nowait(Alive(not trouble, trouble))
            await self._pause_reading()

    async def _pause_reading(self) -> None:
        if self._stopping.is_set():
            await asyncio.sleep(DRAIN_POLL_SECONDS)
            return
        try:
            async with asyncio.timeout(min(self._sender.interval, LIVENESS_SECONDS)):
                await self._stopping.wait()
        except TimeoutError:
            return

    # --- the registry ----------------------------------------------------------------------------

    def _compose(self, sequence: int) -> Heartbeat:
        state = self.state
        return Heartbeat(
            id=self.replica,
            application=self.args.application,
            model=self.args.model,
            url=self._url,
            state=state.endpoint,
            sequence=sequence,
            adapters=sorted(self._adapters.loaded),
            adapter_problems={
                name: scrub(problem, self._secrets) for name, problem in self._adapters.problems.items()
            },
            capacity=self._capacity,
            load=self._load,
            memory=self._memory,
            accelerator=self.args.accelerator,
            node=self.node,
            restarts=state.restarts,
            reason=state.reason,
            message=state.message if state.endpoint is not EndpointState.READY else "",
            gone=state.phase is Phase.GONE,
        )

    def _on_reply(self, sequence: int, reply: HeartbeatReply) -> None:
        if self._leave is None or self.state.phase is not Phase.LEAVING:
            return
        if self._leave.is_confirmed(sequence, reply):
            self._events.put_nowait(Left())
