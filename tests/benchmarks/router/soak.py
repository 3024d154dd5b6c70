"""``python -m tests.benchmarks.router.soak``: load, faults, and an account of every request."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tests.benchmarks.common import OUTPUT, Check, Report, machine_lock
from tests.benchmarks.router import workload
from tests.benchmarks.router.contestants import HEADERS
from tests.benchmarks.router.faults import Fleet, Injector, Router
from tests.benchmarks.router.ledger import EXPLAINS, Account, account, read_entries, read_executions
from tests.benchmarks.router.native import load, tool
from tests.benchmarks.router.processes import Cores

COLUMNS = ("fault", "", "requests", "ok", "tried again", "continued", "resent", "clear errors", "broken")
CONNECTIONS = 2000
CHUNKS = 30
RSS_PERIOD = 1.0


def _requests(path: Path, seed: int) -> Path:
    """Half streams of 30 chunks, half whole answers, 2 to 8 KB, some of them with a shared system prompt."""
    rng = random.Random(seed)
    systems = [workload.text(rng, 300) for _ in range(4)]
    requests = []
    for index in range(64):
        messages = [
            workload.message("system", systems[index % 4]),
            workload.message("user", workload.mark(CHUNKS) + workload.text(rng, rng.randrange(200, 1700))),
        ]
        requests.append(workload.Request(workload.chat(messages, max_tokens=CHUNKS, stream=index % 2 == 0)))
    return workload.write(path, requests)


def _capacity(router: Router, requests: Path, cores: Cores, share: float) -> float:
    """Requests a second that make ``share`` of what the router can do on this machine."""
    figures = load(
        router.port, requests, cpu=cores.load, connections=256, duration=5, headers=HEADERS, verify=1,
        first_id=1 << 40,
    )  # fmt: skip
    return share * float(figures["ok"]) / float(figures["seconds"])


class _Memory(threading.Thread):
    """Samples the router's memory."""

    def __init__(self, router: Router) -> None:
        super().__init__(daemon=True)
        self._router = router
        self._ended = threading.Event()
        self.samples: list[tuple[float, float, int]] = []

    def run(self) -> None:
        while not self._ended.wait(RSS_PERIOD):
            process = self._router.process
            self.samples.append((time.monotonic(), process.rss_mib(), process.pid))

    def stop(self) -> None:
        """End it."""
        self._ended.set()
        self.join()

    def course(self, every: float = 20.0) -> str:
        """MiB of the router, one figure for so many seconds."""
        step = round(every / RSS_PERIOD)
        return " ".join(f"{rss:.0f}" for _, rss, _ in self.samples[::step])

    def growth(self, since: float) -> float | None:
        """MiB from the first tenth after ``since`` to the last tenth, of one and the same router."""
        taken = [rss for at, rss, pid in self.samples if at >= since and pid == self._router.process.pid]
        size = len(taken) // 10
        if size < 2:
            return None
        return sum(taken[-size:]) / size - sum(taken[:size]) / size


def main(  # noqa: PLR0917 - typer: a parameter is an option
    duration: Annotated[float, typer.Option(help="Seconds under load.")] = 600,
    workers: Annotated[int, typer.Option(help="Worker processes of the router.")] = 2,
    replicas: Annotated[int, typer.Option(help="Engines.")] = 4,
    share: Annotated[float, typer.Option(help="Load as a share of what the router can do here.")] = 0.7,
    rate: Annotated[float, typer.Option(help="Requests a second instead; 0 measures.")] = 0,
    faults: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(EXPLAINS)}; default all.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the order of faults.")] = 1,
    output: Annotated[Path, typer.Option(help="Where soak.json goes.")] = OUTPUT,
    lock: Annotated[Path | None, typer.Option(help="File to lock meanwhile.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep ledger and logs in this directory.")] = None,
) -> None:
    """Soak the router; exit with 1 unless every request is accounted for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kinds = [kind.strip() for kind in faults.split(",") if kind.strip()] or list(EXPLAINS)
    unknown = [kind for kind in kinds if kind not in EXPLAINS]
    if unknown:
        raise typer.BadParameter(f"unknown fault {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="modelfleet-soak-") as folder, machine_lock(lock):
        directory = keep or Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        plan = Plan(directory, duration, workers, replicas, share, rate, kinds, seed)
        report, complete = _soak(plan)
    path = report.write(output)
    report.print()
    print(f"Figures: {path}")
    if not complete:
        sys.exit(1)


@dataclass(frozen=True)
class Plan:
    """What a soak is to do."""

    directory: Path
    duration: float
    workers: int
    replicas: int
    share: float
    rate: float
    kinds: list[str]
    seed: int


def _soak(plan: Plan) -> tuple[Report, bool]:
    cores = Cores.choose()
    directory = plan.directory
    requests = _requests(directory / "requests", plan.seed)
    fleet = Fleet(directory, plan.replicas)
    try:
        router = Router(directory, fleet.routes, plan.workers)
        memory = _Memory(router)
        try:
            rate = plan.rate or _capacity(router, requests, cores, plan.share)
            print(f"==> {rate:,.0f} requests a second for {plan.duration:.0f} s", flush=True)
            memory.start()
            generator = _generate(
                router.port, requests, directory / "ledger", cores.load, plan.duration, rate
            )
            injector = Injector(fleet, router, random.Random(plan.seed))
            half = _inject(injector, plan)
            out, error = generator.communicate(timeout=180)
            if generator.returncode:
                raise RuntimeError(f"loadgen: {error[-500:]}")
            memory.stop()
        finally:
            router.process.stop()
    finally:
        fleet.close()
    figures: dict[str, Any] = json.loads(out)
    result = account(read_entries(directory / "ledger"), read_executions(fleet.logs()), injector.faults)
    for entry in result.unexplained[:20]:
        print(f"unexplained: {entry}")
    report = _report(result, figures, memory.growth(half), rate)
    report.put("soak.faults", len(injector.faults))
    report.put("soak.memory_mib", memory.course())
    return report, result.complete(int(figures["arrivals"]))


def _inject(injector: Injector, plan: Plan) -> float:
    """Run the faults; returns when the second half began.

    Routers restart in the first half; in the second one the same processes show whether memory stays.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"==> {time.monotonic() - began:5.0f} s  {text}", flush=True)

    injector.run(plan.duration / 2, list(plan.kinds), say)
    half = time.monotonic() + 5
    lasting = [kind for kind in plan.kinds if kind not in {"router restarted", "worker killed"}]
    injector.run(plan.duration / 2, lasting or list(plan.kinds), say)
    return half


def _generate(
    port: int, requests: Path, ledger: Path, cpu: int, duration: float, rate: float
) -> subprocess.Popen[str]:
    command = [
        "taskset",
        "-c",
        str(cpu),
        str(tool("loadgen")),
        "--port",
        str(port),
        "--requests",
        str(requests),
    ]
    command += ["--mode", "open", "--rate", f"{rate:.3f}", "--connections", str(CONNECTIONS), "--verify", "1"]
    command += ["--duration", str(duration), "--timeout", "60", "--drain", "90", "--ledger", str(ledger)]
    for header in HEADERS:
        command += ["--header", header]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _report(result: Account, figures: dict[str, Any], growth: float | None, rate: float) -> Report:
    report = Report("soak", "Router soak: what became of every request, by the fault that it met", COLUMNS)
    broken = ("stream_error", "truncated", "no_answer", "refused", "timeout", "wrong")
    for kind, row in sorted(result.table.items(), key=lambda item: -item[1]["requests"]):
        clear = {name.split()[1]: count for name, count in row.items() if name.startswith("http_error")}
        cells = [str(row[name] or "") for name in ("requests", "ok", "tried again", "continued", "resent")]
        cells.append(", ".join(f"{status}: {count}" for status, count in clear.items()))
        cells.append(", ".join(f"{name}: {row[name]}" for name in broken if row[name]))
        report.rows.append((kind, "", *cells))
        for name, count in row.items():
            report.put(f"soak.{kind}.{name}".replace(" ", "_"), count)
    arrivals = int(figures["arrivals"])
    unaccounted = arrivals - result.sent
    report.checks += [
        Check("requests without an entry", unaccounted, 0, at_most=True),
        Check("requests with two entries", result.repeated_ids, 0, at_most=True),
        Check("errors that no fault explains", len(result.unexplained), 0, at_most=True),
        Check("answers that no engine gave", len(result.never_executed), 0, at_most=True),
        Check("requests run twice without a fault", len(result.repeated_without_fault), 0, at_most=True),
        Check("memory growth in the second half", growth, 16, at_most=True, unit="MB"),
    ]
    for name, value in (
        ("sent", arrivals), ("answered", result.answered), ("errors", result.errors), ("rate", rate),
        ("continued", result.continued), ("latency_p99_ms", figures["latency_ms"]["p99"]),
    ):  # fmt: skip
        report.put(f"soak.{name}", value)
    executed = ", ".join(f"{count:,} x {times}" for times, count in sorted(result.executed.items()))
    report.notes.append(
        f"{arrivals:,} sent = {result.answered:,} whole answers + {result.errors:,} errors; "
        f"engine runs a request: {executed}; continued streams: {result.continued:,}"
    )
    return report


if __name__ == "__main__":
    typer.run(main)
