"""How the demos end: the exit status is what a script or CI has of them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.controlplane.bed import wait_until

ROOT = Path(__file__).parents[3]
# The demo itself, without what takes minutes; `modelfleet up` is played by fake_up.py.
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import demo, demo_steps
demo.install_engine = lambda: None
demo.write_file = lambda target, hint: None
demo.UP = (sys.executable, {str(Path(__file__).with_name("fake_up.py"))!r})
sys.exit(demo_steps.exit_code(demo.demo))
"""


def start(how: str, tmp_path: Path, *, once: bool = True, background: bool = False) -> subprocess.Popen[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("DEMO_", "MODELFLEET_"))},
        "FAKE_UP": how,
        "MODELFLEET_STATE": str(tmp_path),
        "DEMO_LISTEN": "127.0.0.1:0",
        "DEMO_ONCE": "1" if once else "",
    }
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_as_a_shell_starts_jobs if background else None,  # noqa: PLW1509
    )


def _as_a_shell_starts_jobs() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("ok", 0, "> Paris."),
        ("empty", 1, "the answer is missing: it is empty"),
        ("busy", 1, "the answer is missing: Error code: 503"),
        ("dies", 1, "error: modelfleet up ended with code 3"),
    ],
)
def test_once_exits_zero_only_when_every_answer_is_there(
    how: str, code: int, said: str, tmp_path: Path
) -> None:
    with start(how, tmp_path) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert said in output
    assert "Traceback" not in output
    assert ("up has ended" in output) == (how != "dies"), "what was started has ended before the demo does"


def lines_until(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if wanted in line:
            return
    raise AssertionError(f"no {wanted!r} in {seen}")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_the_answers_is_no_success(
    how: signal.Signals, background: bool, tmp_path: Path
) -> None:
    with start("slow", tmp_path, background=background) as process:
        lines_until(process, "modelfleet up -f")
        wait_until((tmp_path / "state.json").exists, timeout=20, what="`modelfleet up` at work")
        process.send_signal(how)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "interrupted; nothing is left running" in output
    assert "up has ended" in output
    assert "Traceback" not in output


def test_ctrl_c_ends_what_was_meant_to_run_until_then(tmp_path: Path) -> None:
    with start("ok", tmp_path, once=False) as process:
        lines_until(process, "and watch traffic and engines follow")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "up has ended" in output


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("script", ["demo.py", "demo_cluster.py"])
def test_a_taken_port_is_told_before_anything_takes_time(script: str, taken: str) -> None:
    done = run(script, DEMO_LISTEN=taken)
    assert done.returncode == 1
    assert f"the router can't listen on {taken}: Address already in use" in done.stderr
    assert "DEMO_LISTEN=" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("listen", ["8000", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_told(listen: str) -> None:
    done = run("demo.py", DEMO_LISTEN=listen)
    assert done.returncode == 1
    assert re.search(rf"^error: .*{listen}", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_a_control_plane_without_go_is_told_what_to_do(tmp_path: Path) -> None:
    done = run("demo_cluster.py", PATH="/nowhere", MODELFLEET_CACHE=str(tmp_path), KUBEBUILDER_ASSETS="")
    assert done.returncode == 1
    assert "there is no `go` on PATH. Install Go" in done.stderr
    assert "Traceback" not in done.stderr


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
