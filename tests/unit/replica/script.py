"""The adapter of the tiny engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from modelfleet_serving.contract import ApplicationArgs, EngineMemory, EngineSettings
from modelfleet_serving.engines import Drain, EngineAdapter, Launch, Probe, SettingsProblem
from modelfleet_serving.engines.exposition import LoadMetrics

ENGINE = Path(__file__).parent / "engine.py"


class ScriptEngine(EngineAdapter):
    name: ClassVar[str] = "Script"
    readiness: ClassVar[Probe] = Probe("/health")
    liveness: ClassVar[Probe] = Probe("/health", timeout_seconds=1)
    load_metrics: ClassVar[LoadMetrics] = LoadMetrics("test_running", "test_waiting", "test_kv")
    drain: ClassVar[Drain] = Drain(grace_seconds=3)

    def problems(self, args: ApplicationArgs, launch: Launch) -> list[SettingsProblem]:
        return []

    def _command(self, args: ApplicationArgs, launch: Launch) -> list[str]:
        options: dict[str, Any] = {**args.engine.args, "host": launch.host, "port": launch.port}
        return [sys.executable, "-S", str(ENGINE), json.dumps(options)]

    def _environment(self, args: ApplicationArgs, launch: Launch) -> dict[str, str]:
        return {}

    def read_log(self, line: str, known: EngineMemory) -> EngineMemory:
        if line.startswith("loaded "):
            return msgspec.structs.replace(known, weights_gib=float(line.split()[1]))
        return known


def arguments(folder: Path, registry: str = "http://127.0.0.1:9", **engine_args: Any) -> ApplicationArgs:
    env = {"TEST_TOKEN": "hf_abcdef123456"}
    return ApplicationArgs(
        namespace="default",
        deployment="m",
        model="m",
        variant="a",
        revision="r1",
        source=f"file://{folder}",
        registry=registry,
        engine=EngineSettings(
            type="Script", max_num_seqs=7, args={"folder": str(folder), **engine_args}, env=env
        ),
        start_timeout_seconds=10,
        drain_timeout_seconds=10,
    )


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_with(text: str) -> list[int]:
    """Processes whose command line or working directory holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if text in entry.joinpath("cmdline").read_text() or text in str(entry.joinpath("cwd").readlink()):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if alive(pid)]
