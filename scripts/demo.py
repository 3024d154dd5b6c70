"""`make demo`: a real small model in two quantization variants, from a YAML file to a streamed token.

Installs an engine for this machine and makes the model when they are not there yet, starts `modelfleet up`,
asks both variants, and prints what they said. With ``DEMO_ONCE=1`` it then ends everything and exits 0, or 1
when an answer is missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo_steps import (
    FILE,
    MODEL,
    READY_SECONDS,
    ROOT,
    VARIANTS,
    DemoError,
    ask_all,
    exit_code,
    install_engine,
    listen_address,
    no_more_interrupts,
    once,
    step,
    write_file,
)

from modelfleet_operator.clients.processes import die_with_parent

UP = (sys.executable, "-m", "modelfleet_operator.cli", "up")
HINT = """Edit it while the demo runs: a changed weight moves traffic, a changed engine field
# rolls a new revision out, a removed variant drains."""


def demo() -> bool:
    """Everything; whether all were answered."""
    started = time.monotonic()
    listen = listen_address("127.0.0.1:8000")
    install_engine()
    write_file("demo", HINT)
    given = os.environ.get("MODELFLEET_STATE")
    with tempfile.TemporaryDirectory(prefix="modelfleet-demo-") as directory:
        return serve(listen, Path(given or directory), started)


def serve(listen: str, state: Path, started: float) -> bool:
    """Run `modelfleet up` beside us and ask what it serves."""
    step(f"modelfleet up -f {FILE.relative_to(ROOT)}")
    process = subprocess.Popen(
        [*UP, "-f", str(FILE), "--listen", listen],
        env=os.environ | {"MODELFLEET_STATE": str(state)},
        start_new_session=True,  # Ctrl-C reaches this script alone, which then ends it in order
        preexec_fn=die_with_parent,  # noqa: PLW1509  it only calls the kernel
    )
    try:
        router = wait_until_ready(process, state)
        step(f"both variants serve after {time.monotonic() - started:.0f} s; asking them")
        good = ask_all(router)
        if not once():
            until_interrupted(process, router, state)
        return good
    finally:
        no_more_interrupts()
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], state: Path) -> str:
    """The router's address, once both variants serve.

    Raises:
        DemoError: `modelfleet up` ended, or they don't in time.
    """
    file = state / "state.json"
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"modelfleet up ended with code {process.returncode}")
        if file.exists():
            info = json.loads(file.read_bytes())
            rows = [v for d in info["deployments"] for v in d.get("status", {}).get("variants", [])]
            if len(rows) == len(VARIANTS) and all(v["reason"] == "Serving" for v in rows):
                return str(info["router"])
        time.sleep(0.5)
    raise DemoError(f"not ready within {READY_SECONDS:.0f} s; what stands above says why")


def how_to_go_on(router: str, state: Path) -> None:
    step("it runs until Ctrl-C. In another terminal:")
    print(
        f"""
  export MODELFLEET_STATE={state}
  .venv/bin/modelfleet get {MODEL}
  .venv/bin/modelfleet chat {MODEL}:int8 "Why is the sky blue?"
  curl {router}/v1/chat/completions -H 'content-type: application/json' -d \\
    '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 32}}'

  Edit {FILE.relative_to(ROOT)} and watch traffic and engines follow.
""",
        flush=True,
    )


def until_interrupted(process: subprocess.Popen[bytes], router: str, state: Path) -> None:
    """Say what can be done now, and wait for Ctrl-C.

    Raises:
        DemoError: `modelfleet up` ended by itself.
    """
    try:
        how_to_go_on(router, state)
        process.wait()
    except KeyboardInterrupt:
        return
    raise DemoError(f"modelfleet up ended with code {process.returncode}")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(exit_code(demo))
