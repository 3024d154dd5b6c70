"""What an engine is to the platform: a pure description, without I/O.

An :class:`EngineAdapter` says how its engine is started, when it is ready, what its metrics and log
lines mean, which endpoints it serves and how it drains. The replica does the I/O. Nothing outside this
package asks which engine it has in hand.
"""

from __future__ import annotations

import abc
import enum
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from modelfleet_serving.contract import (
    ApplicationArgs,
    EngineLoad,
    EngineMemory,
    EngineSettings,
    Task,
)
from modelfleet_serving.engines.exposition import LoadMetrics, read_load

KEEP_ALIVE_SECONDS: Final = 300
"""How long an engine keeps an idle connection. The engines' own default of 5 s closes it just when a router
is about to use it again."""


class Platform(enum.StrEnum):
    """What an engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The facts of one start that the machine decides, not the user."""

    python: str
    """Interpreter of the engine's own environment."""
    model: str
    """The weights as the engine takes them: a directory, or a model id of a hub."""
    host: str = "127.0.0.1"
    port: int
    platform: Platform = Platform.CPU
    model_is_local: bool = True
    """``model`` is a directory: the engine needs no network."""
    model_revision: str | None = None
    """Branch, tag or commit, for a model id of a hub."""
    visible_devices: tuple[str, ...] = ()
    """GPUs that the engine may use, by index or UUID; empty leaves the environment as it is."""
    media_cache: str | None = None
    """Directory where fetched images and videos may be kept."""


@dataclass(frozen=True)
class Probe:
    """A GET that tells whether the engine takes requests."""

    path: str
    status: int = 200
    timeout_seconds: float = 5.0
    """Longest time for one attempt."""


@dataclass(frozen=True)
class Drain:
    """How the engine ends without losing a request: a signal, then wait for the process to exit.

    The signal goes to the process that was started and never to its group: a worker that gets it too
    dies under the requests it runs. No engine tells the router that it drains, and most refuse new
    requests meanwhile: it has to be out of the route table before the signal.
    """

    signal: signal.Signals = signal.SIGTERM
    bounded: bool = True
    """The engine ends by itself within ``drain_timeout_seconds`` and ``grace_seconds``, whatever runs. If
    not, only SIGKILL to its group bounds it, and that is due then."""
    grace_seconds: float = 15.0
    """Time for the tear-down, after the drain timeout and before the process group is killed."""


@dataclass(frozen=True)
class Call:
    """An HTTP request to a running engine."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    success: frozenset[int] = frozenset({200})


@dataclass(frozen=True)
class Sleep:
    """How an engine gives its memory back and takes it again, and how to see that it sleeps."""

    sleep: Call
    wake: Call


@dataclass(frozen=True, kw_only=True)
class AdapterCalls:
    """Where a running engine takes LoRA adapters and lets them go; both are POSTs."""

    load: str
    unload: str
    not_loaded: int
    """Status of an unload that has nothing to unload."""


@dataclass(frozen=True)
class SettingsProblem:
    """One thing wrong with an engine's settings."""

    field: str
    """As a user writes it: ``engine.maxNumSeqs``."""
    value: object
    allowed: str
    """What may stand there, or why this can't."""

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r} is not possible: {self.allowed}"


class EngineSettingsError(ValueError):
    """Settings that the engine can't be started with. Carries every problem, not only the first."""

    def __init__(self, engine: str, problems: Sequence[SettingsProblem]) -> None:
        self.engine = engine
        self.problems = tuple(problems)
        super().__init__(f"{engine}: " + "; ".join(str(problem) for problem in problems))


class EngineAdapter(abc.ABC):
    """The description of one engine."""

    name: ClassVar[str]
    """As in ``engine.type``."""
    readiness: ClassVar[Probe]
    """Answers as expected once the engine takes requests, and before that refuses or fails."""
    liveness: ClassVar[Probe]
    """Fails when the engine is broken. Says nothing about sleeping or draining: that the supervisor knows."""
    metrics_path: ClassVar[str] = "/metrics"
    load_metrics: ClassVar[LoadMetrics]
    drain: ClassVar[Drain]
    sleep: ClassVar[Sleep | None] = None
    """``None`` for an engine that can't sleep."""
    adapter_calls: ClassVar[AdapterCalls]
    paths: ClassVar[Mapping[Task, frozenset[str]]]
    """Paths that take requests of a task by POST; a task that the engine doesn't do is missing."""

    @abc.abstractmethod
    def problems(self, args: ApplicationArgs, launch: Launch) -> list[SettingsProblem]:
        """Everything that makes this start impossible; empty when it can be rendered."""

    def command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        """The command line, its first item an executable.

        Raises:
            EngineSettingsError: for settings that the engine can't be started with.
        """
        self._check(args, launch)
        return self._command(args, launch)

    def environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:
        """Variables to set on top of the inherited environment; the user's win over the adapter's.

        Raises:
            EngineSettingsError: for settings that the engine can't be started with.
        """
        self._check(args, launch)
        return {**self._environment(args, launch), **args.engine.env}

    def endpoints(self, task: Task) -> frozenset[str]:
        """Paths that take requests of this task by POST; empty when the engine doesn't do it."""
        return self.paths.get(task, frozenset())

    def capacity(self, settings: EngineSettings) -> int | None:
        """Requests that the engine runs at once; ``None`` when that is the engine's own decision."""
        return settings.max_num_seqs

    @abc.abstractmethod
    def read_log(self, line: str, known: EngineMemory) -> EngineMemory:
        """``known`` with what this line of the engine's log says about its memory; sizes are in GiB."""

    def load_adapter(self, name: str, path: str) -> Call:
        """The call that loads a LoRA adapter into a running engine. 200 when it serves."""
        return Call("POST", self.adapter_calls.load, {"lora_name": name, "lora_path": path})

    def unload_adapter(self, name: str) -> Call:
        """The call that unloads a LoRA adapter, which may have gone already."""
        success = frozenset({200, self.adapter_calls.not_loaded})
        return Call("POST", self.adapter_calls.unload, {"lora_name": name}, success)

    def read_load(self, exposition: str) -> EngineLoad:
        """The engine's work, from what its metrics path answered (Prometheus text format).

        Raises:
            ValueError: when it isn't Prometheus text.
        """
        return read_load(exposition, self.load_metrics)

    def read_boot(self, lines: Iterable[str]) -> EngineMemory:
        """What a boot log says about the engine's memory."""
        memory = EngineMemory()
        for line in lines:
            memory = self.read_log(line, memory)
        return memory

    @abc.abstractmethod
    def _command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        """:meth:`command` of settings without problems."""

    @abc.abstractmethod
    def _environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:
        """:meth:`environment` of settings without problems, without the user's own variables."""

    def _check(self, args: ApplicationArgs, launch: Launch) -> None:
        if problems := self.problems(args, launch):
            raise EngineSettingsError(self.name, problems)
