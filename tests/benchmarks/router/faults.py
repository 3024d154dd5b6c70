"""The soak's faults: replicas that die, drain, stall and fail, tables that change, routers that restart."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tests.benchmarks.router import peers
from tests.benchmarks.router.contestants import MODEL, write_tenants
from tests.benchmarks.router.ledger import Fault
from tests.benchmarks.router.native import Engines
from tests.benchmarks.router.processes import Process, free_ports

FAULT_SECONDS = 3.0
STALL_TIMEOUT = 3.0
"""First byte and idle time-out of the routers under test."""
GRACE_SECONDS = STALL_TIMEOUT + 3.0
"""How long after its end a fault may still be seen: time-outs, then ejections that end."""
SETTINGS = {"prefill_us": 4000, "interval_us": 10_000, "verify": 1, "cut_after": 4}


def now_us() -> int:
    """The clock of the ledger."""
    return time.monotonic_ns() // 1000


@dataclass
class Fleet:
    """Replicas in processes of their own, and the table that names them."""

    directory: Path
    count: int
    states: list[str] = field(init=False)
    ports: list[list[int]] = field(init=False)
    engines: list[Engines | None] = field(init=False)
    version: int = 0

    def __post_init__(self) -> None:
        block = free_ports(2 * self.count)
        self.ports = [block[2 * i : 2 * i + 2] for i in range(self.count)]
        self.states = ["Ready"] * self.count
        self.engines = [None] * self.count
        for index in range(self.count):
            self.start(index)
        self.write_table()

    @property
    def routes(self) -> Path:
        """The table's file."""
        return self.directory / "routes.json"

    def logs(self) -> list[Path]:
        """What the engines were asked."""
        return [self.directory / f"engine-{index}.log" for index in range(self.count)]

    def start(self, index: int) -> None:
        """Start a replica on its port."""
        self.engines[index] = Engines(1, log=self.logs()[index], ports=self.ports[index], settings=SETTINGS)

    def kill(self, index: int) -> None:
        """End a replica without a word."""
        engine = self.engines[index]
        if engine is not None:
            os.kill(engine.process.pid, signal.SIGKILL)
            engine.process.stop()
            self.engines[index] = None

    def mode(self, index: int, mode: str) -> None:
        """Change what a replica does."""
        engine = self.engines[index]
        if engine is not None:
            engine.configure(mode=mode)

    def write_table(self, *, without: int | None = None) -> None:
        """Write the table, with some models more than before so that it always differs."""
        self.version += 1
        endpoints = [
            {
                "id": f"r{index}",
                "url": f"http://127.0.0.1:{self.ports[index][1]}",
                "state": self.states[index],
            }
            for index in range(self.count)
            if index != without
        ]
        others = [{"name": f"other-{self.version}-{n}", "variants": [{"name": "v"}]} for n in range(50)]
        variants = [{"name": "bf16", "endpoints": endpoints}]
        served = {"name": MODEL, "affinity": "Prefix", "weights": {"bf16": 1}, "variants": variants}
        fresh = self.routes.with_suffix(".new")
        fresh.write_text(json.dumps({"models": [served, *others]}))
        fresh.replace(self.routes)

    def close(self) -> None:
        """End all replicas."""
        for engine in self.engines:
            if engine is not None:
                engine.close()


class Router:
    """The router under test: several workers on one port, restarted without a gap."""

    def __init__(self, directory: Path, routes: Path, workers: int) -> None:
        self.port = free_ports(1)[0]
        self._directory = directory
        self._starts = 0
        self._command = [
            str(peers.our_python()), "-m", "modelfleet_serving.router",
            "--listen", f"127.0.0.1:{self.port}", "--routes", str(routes), "--workers", str(workers),
            "--tenants", str(write_tenants(directory / "tenants.yaml")),
            "--access-log", str(directory / "access.log"),
            "--first-byte-timeout", str(STALL_TIMEOUT), "--idle-timeout", str(STALL_TIMEOUT),
            "--health-interval", "1", "--drain-timeout", "30",
        ]  # fmt: skip
        self.process = self._start()

    def _start(self) -> Process:
        self._starts += 1
        ready = self._directory / f"port-{self._starts}"
        command = [*self._command, "--port-file", str(ready)]
        env = {**os.environ, **peers.our_environment()}
        process = Process("router", command, log=self._directory / f"router-{self._starts}.log", env=env)
        deadline = time.monotonic() + 60
        while not ready.exists():
            if not process.alive() or time.monotonic() > deadline:
                process.stop()
                raise RuntimeError(f"the router does not start: {process.log_tail()}")
            time.sleep(0.05)
        return process

    def restart(self) -> None:
        """A new router beside the old one on the same port; then the old one drains and ends."""
        old = self.process
        self.process = self._start()
        old.popen.send_signal(signal.SIGTERM)
        old.popen.wait(timeout=40)

    def kill_worker(self, rng: random.Random) -> bool:
        """End one worker process without a word."""
        workers = [
            process
            for process in self.process.tree()
            if "modelfleet_serving.router.process" in process.cmdline()
        ]
        if not workers:
            return False
        victim: psutil.Process = rng.choice(workers)
        victim.kill()
        return True


@dataclass
class Injector:
    """Injects one fault after another, with quiet times between them, and writes down when."""

    fleet: Fleet
    router: Router
    rng: random.Random
    faults: list[Fault] = field(default_factory=list)

    def run(self, seconds: float, kinds: list[str], say: Callable[[str], None]) -> None:
        """Faults of ``kinds`` in turn until the time is over."""
        deadline = time.monotonic() + seconds
        turn = 0
        while deadline - time.monotonic() > FAULT_SECONDS + GRACE_SECONDS:
            if turn % len(kinds) == 0:
                self.rng.shuffle(kinds)
            kind = kinds[turn % len(kinds)]
            turn += 1
            index = self.rng.randrange(self.fleet.count)
            say(f"{kind} (replica {index})" if kind.startswith("replica") else kind)
            begin = now_us()
            self._inject(kind, index)
            grace = 0.5 if kind in {"table changed", "replica drained"} else GRACE_SECONDS
            self.faults.append(Fault(kind, f"r{index}", begin, now_us() + int(grace * 1e6)))
            time.sleep(grace + 2.0)  # a quiet time: what fails in it has no excuse
        time.sleep(max(0.0, deadline - time.monotonic()))

    def _inject(self, kind: str, index: int) -> None:
        fleet = self.fleet
        modes = {
            "replica stalled": "stall", "replica answers 500": "500", "replica resets": "reset",
            "replica cuts streams": "cut",
        }  # fmt: skip
        if kind in modes:
            fleet.mode(index, modes[kind])
            time.sleep(FAULT_SECONDS)
            fleet.mode(index, "ok")
        elif kind == "replica killed":
            fleet.kill(index)
            time.sleep(FAULT_SECONDS)
            fleet.start(index)
        elif kind == "replica drained":
            fleet.states[index] = "Draining"
            fleet.write_table()
            time.sleep(FAULT_SECONDS)
            fleet.states[index] = "Ready"
            fleet.write_table()
        elif kind == "table changed":
            for _ in range(int(FAULT_SECONDS / 0.5)):
                fleet.write_table(without=self.rng.randrange(fleet.count))
                time.sleep(0.5)
            fleet.write_table()
        elif kind == "router restarted":
            self.router.restart()
        elif kind == "worker killed":
            self.router.kill_worker(self.rng)
            time.sleep(0.5)
        else:
            raise ValueError(f"unknown fault {kind!r}")
