"""`modelfleet up` as a user runs it: a process of its own, watched from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil

from modelfleet_operator.clients.processes import die_with_parent

T = TypeVar("T")
STOP_SECONDS = 40.0


def until(what: str, probe: Callable[[], T | None], seconds: float) -> T:
    """The probe's first answer that is not falsy.

    Raises:
        AssertionError: none within the time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


class Platform:
    """One `modelfleet up`."""

    def __init__(self, directory: Path, text: str, port: int) -> None:
        self.file = directory / "models.yaml"
        self.file.write_text(text)
        self.state = directory / "state"
        self.output = directory / "up.log"
        self.url = f"http://127.0.0.1:{port}"
        self.environment = os.environ | {"MODELFLEET_STATE": str(self.state)}
        command = [sys.executable, "-m", "modelfleet_operator.cli", "up", "-v", "-f", str(self.file)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--listen", f"127.0.0.1:{port}"],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A killed test run leaves no platform behind; nothing here has threads yet.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def documents(self) -> list[dict[str, Any]]:
        """The ModelDeployments with status, as `get -o json` reads them."""
        try:
            found: list[dict[str, Any]] = json.loads((self.state / "state.json").read_bytes())["deployments"]
        except FileNotFoundError:
            return []
        return found

    def variants(self) -> dict[str, dict[str, Any]]:
        """Status rows by variant."""
        return {v["name"]: v for d in self.documents() for v in d.get("status", {}).get("variants", [])}

    def wait_ready(self, *names: str, seconds: float = 300) -> dict[str, dict[str, Any]]:
        """Wait until exactly these variants serve."""

        def ready() -> dict[str, dict[str, Any]] | None:
            assert self.process.poll() is None, self.log()
            rows = self.variants()
            good = rows.keys() == set(names) and all(r["reason"] == "Serving" for r in rows.values())
            return rows if good else None

        try:
            rows = until(f"{names} serve", ready, seconds)
            until("the router lists models", lambda: list(self.client.models.list()), 10)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{json.dumps(self.documents(), indent=1)}\n{self.log()}") from None
        return rows

    def edit(self, pattern: str, replacement: str) -> None:
        """Change the file as an editor would: write beside it, then rename."""
        text, count = re.subn(pattern, replacement, self.file.read_text(), flags=re.DOTALL)
        assert count == 1, f"{pattern} stands {count} times"
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.file)

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Another `modelfleet` command beside it."""
        return subprocess.run(
            [sys.executable, "-m", "modelfleet_operator.cli", *arguments],
            env=self.environment | {"NO_COLOR": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def engines(self, model: str) -> list[psutil.Process]:
        """API server processes of engines whose command line names a model directory."""
        found = []
        for process in self.tree():
            try:
                command = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if "api_server" in command and model in command and "guard" not in command:
                found.append(process)
        return found

    def tree(self) -> list[psutil.Process]:
        """Every process that belongs to this run, by its state directory in the environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("MODELFLEET_STATE") == str(self.state)
                    and process.pid != os.getpid()
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def log(self) -> str:
        """What `up` printed, its end."""
        return self.output.read_text(errors="replace")[-6000:]

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_SECONDS)

    def close(self) -> None:
        """End it, if it still runs, with everything that belongs to it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in self.tree():
            process.kill()
