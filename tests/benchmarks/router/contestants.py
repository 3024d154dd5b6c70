"""How each contestant is started: one core, one worker, the same engines behind it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.router import peers
from tests.benchmarks.router.processes import Process, free_ports

MODEL = "m"
API_KEY = "sk-benchmark-0123456789abcdef"
HEADERS = (f"authorization: Bearer {API_KEY}",)


@dataclass(frozen=True)
class Setup:
    """What a contestant is started with."""

    port: int
    side_port: int
    """For a contestant that insists on a second port (metrics)."""
    engines: Sequence[str]
    directory: Path


@dataclass(frozen=True)
class Contestant:
    """One router in one mode."""

    name: str
    command: Callable[[Setup], list[str]]
    title: str
    kind: str
    """``ours``, ``rust-rr`` and ``rust-cache`` (the peers to beat), ``bound`` or ``other``."""
    env: tuple[tuple[str, str], ...] = ()
    slow: bool = False
    """Only measured at sizes and connections that it can take."""
    start_timeout: float = 60.0


def write_routes(path: Path, engines: Sequence[str], *, affinity: str = "Prefix", model: str = MODEL) -> Path:
    """A route table with one model and one variant."""
    endpoints = [{"id": f"r{i}", "url": url, "state": "Ready"} for i, url in enumerate(engines)]
    variant = {"name": "bf16", "endpoints": endpoints}
    served = {"name": model, "affinity": affinity, "weights": {"bf16": 100}, "variants": [variant]}
    table = {"models": [served]}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(table))
    fresh.replace(path)
    return path


def write_tenants(path: Path) -> Path:
    """One tenant, with limits that are counted and never reached."""
    key = {
        "name": "bench",
        "hash": "sha256:" + hashlib.sha256(API_KEY.encode()).hexdigest(),
        "requestsPerMinute": 10**9,
        "inputTokensPerMinute": 10**13,
        "outputTokensPerMinute": 10**13,
        "concurrency": 10**6,
    }
    path.write_text(json.dumps({"keys": [key]}))  # JSON is YAML
    return path


def _ours(affinity: str, *, workers: int = 1) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        routes = write_routes(setup.directory / "routes.json", setup.engines, affinity=affinity)
        tenants = write_tenants(setup.directory / "tenants.yaml")
        return [
            str(peers.our_python()), "-m", "modelfleet_serving.router",
            "--listen", f"127.0.0.1:{setup.port}", "--routes", str(routes), "--workers", str(workers),
            "--tenants", str(tenants), "--access-log", str(setup.directory / "access.log"),
        ]  # fmt: skip

    return command


def _vllm(policy: str) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        return [
            str(peers.binary("vllm-router")), "--host", "127.0.0.1", "--port", str(setup.port),
            "--worker-urls", *setup.engines, "--policy", policy, "--log-level", "warning",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(setup.side_port),
            "--worker-startup-check-interval", "1",
        ]  # fmt: skip

    return command


def _sglang(policy: str) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        return [
            str(peers.binary("sglang-router")), "launch", "--host", "127.0.0.1", "--port", str(setup.port),
            "--worker-urls", *setup.engines, "--policy", policy, "--log-level", "error",
            "--prometheus-host", "127.0.0.1", "--prometheus-port", str(setup.side_port),
        ]  # fmt: skip

    return command


HAPROXY = """
global
  nbthread 1
  maxconn 8192
  {tuning}
defaults
  mode http
  timeout connect 5s
  timeout client 3600s
  timeout server 3600s
  option http-keep-alive
  option abortonclose
  option http-no-delay
  http-reuse always
frontend front
  bind 127.0.0.1:{port}
  http-request return status 200 content-type text/plain string ok if {{ path /health }}
  {choice}
backend engines
  balance leastconn
  {servers}
"""


def _haproxy(*, model_from_body: bool) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        servers = [f"server s{i} {url.removeprefix('http://')}" for i, url in enumerate(setup.engines)]
        tuning, choice = "", "default_backend engines"
        if model_from_body:  # the whole body has to fit: it is buffered before the choice
            tuning = "tune.bufsize 524288"
            choice = (
                "option http-buffer-request\n  "
                "http-request set-var(txn.model) req.body,json_query('$.model')\n  "
                f"use_backend engines if {{ var(txn.model) -m str {MODEL} }}"
            )
        text = HAPROXY.format(port=setup.port, tuning=tuning, choice=choice, servers="\n  ".join(servers))
        path = setup.directory / "haproxy.cfg"
        path.write_text(text)
        return [str(peers.binary("haproxy")), "-db", "-f", str(path)]

    return command


def _litellm(setup: Setup) -> list[str]:
    upstreams = [
        {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"} for url in setup.engines
    ]
    models = [{"model_name": MODEL, "litellm_params": upstream} for upstream in upstreams]
    path = setup.directory / "litellm.yaml"
    path.write_text(json.dumps({"model_list": models}))  # JSON is YAML
    return [
        str(peers.binary("litellm")), "--config", str(path), "--host", "127.0.0.1", "--port", str(setup.port),
        "--num_workers", "1", "--telemetry", "False",
    ]  # fmt: skip


LITELLM_ENV = (
    ("LITELLM_LOCAL_MODEL_COST_MAP", "True"),
    ("LITELLM_LOG", "ERROR"),
    ("LITELLM_MASTER_KEY", API_KEY),
)

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("ours", _ours("Prefix"), "modelfleet, everything on", "ours"),
        Contestant("ours-none", _ours("None"), "modelfleet, affinity None", "ours-none"),
        Contestant("vllm-rr", _vllm("round_robin"), "vllm-router round_robin", "rust-rr"),
        Contestant("vllm-cache", _vllm("cache_aware"), "vllm-router cache_aware", "rust-cache"),
        Contestant("sglang-rr", _sglang("round_robin"), "sglang-router round_robin", "rust-rr"),
        Contestant("sglang-cache", _sglang("cache_aware"), "sglang-router cache_aware", "rust-cache"),
        Contestant("haproxy", _haproxy(model_from_body=False), "HAProxy (model not read)", "bound"),
        Contestant("haproxy-json", _haproxy(model_from_body=True), "HAProxy json_query", "bound"),
        Contestant("litellm", _litellm, "LiteLLM proxy", "other", LITELLM_ENV, slow=True, start_timeout=120),
    )
}


class Running:
    """A contestant that runs and answers."""

    def __init__(
        self, contestant: Contestant, engines: Sequence[str], directory: Path, cpu: int | None
    ) -> None:
        self.contestant = contestant
        self.name = contestant.name
        self.directory = directory / contestant.name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port, side_port = free_ports(2)
        command = contestant.command(Setup(self.port, side_port, engines, self.directory))
        env = {**os.environ, **peers.our_environment(), **dict(contestant.env)}
        self.process = Process(contestant.name, command, cpu=cpu, log=self.directory / "log", env=env)
        try:
            self.process.wait_port(self.port, contestant.start_timeout)
            self._wait_answer(contestant.start_timeout)
        except BaseException:
            self.process.stop()
            raise

    def _wait_answer(self, timeout: float) -> None:
        """Wait until each engine can be reached through it."""
        deadline, streak = time.monotonic() + timeout, 0
        while streak < 8:
            status = ask(self.port)
            streak = streak + 1 if status == 200 else 0
            if not self.process.alive() or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} answers {status}: {self.process.log_tail()}")
            if status != 200:
                time.sleep(0.1)

    def stop(self) -> None:
        """End it."""
        self.process.stop(timeout=3)


def ask(port: int, model: str = MODEL, timeout: float = 30.0) -> int:
    """Status of one small chat completion; 0 without an answer."""
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "model": model, "max_tokens": 1})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        headers = {"content-type": "application/json", "authorization": f"Bearer {API_KEY}"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return 0
    else:
        return answer.status
    finally:
        connection.close()


@contextlib.contextmanager
def lineup(
    names: Sequence[str], engines: Sequence[str], directory: Path, cpu: int | None, missing: dict[str, str]
) -> Iterator[list[Running]]:
    """Start contestants; one that can't run is left out, and ``missing`` says why."""
    running: list[Running] = []
    try:
        for name in names:
            if name in missing:
                continue
            try:
                running.append(Running(CONTESTANTS[name], engines, directory, cpu))
            except (RuntimeError, OSError) as error:
                missing[name] = str(error).strip()[-600:]
                print(f"!! {name} does not run here: {missing[name]}", flush=True)
        yield running
    finally:
        for contestant in running:
            contestant.stop()
