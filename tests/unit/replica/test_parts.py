"""Sources, environments, failures, arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.unit.object_store import ObjectStore
from tests.unit.replica.script import alive

from modelfleet_serving.supervisor import guard, object_store
from modelfleet_serving.supervisor.engine_process import EngineProcess, Exit, scrub, secrets_of
from modelfleet_serving.supervisor.failures import classify, describe
from modelfleet_serving.supervisor.launch import inherited_environment
from modelfleet_serving.supervisor.sources import Model, ModelFetchError, ModelNotFoundError, locate


class TestSources:
    @pytest.mark.parametrize(
        ("source", "model"),
        [
            ("hf://Org/Name", Model("Org/Name", is_local=False)),
            ("hf://Org/Name@main", Model("Org/Name", is_local=False, revision="main")),
        ],
    )
    def test_hub(self, source: str, model: Model) -> None:
        assert locate(source, {}) == model

    def test_local(self, tmp_path: Path) -> None:
        (tmp_path / "claim" / "a").mkdir(parents=True)
        environ = {"MODELFLEET_PVC_ROOT": str(tmp_path), "MODELFLEET_OCI_ROOT": str(tmp_path)}
        assert locate(f"file://{tmp_path}", environ).name == str(tmp_path)
        for scheme in ("pvc", "oci"):
            assert locate(f"{scheme}://claim/a", environ) == Model(
                str(tmp_path / "claim" / "a"), is_local=True
            )

    @pytest.mark.parametrize(
        "source", ["file:///nowhere/at/all", "pvc://c/../../etc", "x", "ftp://h/a", "hf://"]
    )
    def test_nothing_there(self, source: str) -> None:
        with pytest.raises(ModelNotFoundError):
            locate(source, {"MODELFLEET_PVC_ROOT": "/"})

    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_a_store_is_copied_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
    ) -> None:
        monkeypatch.setattr(object_store, "PART_BYTES", 1000)
        weights = bytes(range(256)) * 20
        files = {"m/config.json": b"{}", "m/sub/weights": weights, "m/empty": b"", "m2/other": b"another's"}
        environ = {"MODELFLEET_CACHE": str(tmp_path)}
        with ObjectStore(files) as store:
            for name, value in store.environment().items():
                monkeypatch.setenv(name, value)
            store.cut_off = 2  # is asked for again
            first = locate(f"{scheme}://bucket/m", environ)
            with pytest.raises(ModelNotFoundError, match="nothing is there"):
                locate(f"{scheme}://bucket/none", environ)
            store.files = {}
            assert locate(f"{scheme}://bucket/m", environ) == first
        copied = {str(f.relative_to(first.name)): f for f in Path(first.name).rglob("*") if f.is_file()}
        assert copied.keys() == {"config.json", "sub/weights", "empty", ".modelfleet-complete"}
        assert copied["sub/weights"].read_bytes() == weights

    def test_a_store_that_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with ObjectStore({"m/config.json": b"{}"}) as store:
            for name, value in store.environment(key="revoked").items():
                monkeypatch.setenv(name, value)
            with pytest.raises(ModelFetchError, match="InvalidAccessKeyId"):
                locate("s3://bucket/m", {"MODELFLEET_CACHE": str(tmp_path)})
        assert [path.suffix for path in tmp_path.glob("models/*")] == [".lock"], "nothing half copied"


def test_an_engine_inherits_no_cluster_secrets() -> None:
    environ = {
        "RAY_AUTH_TOKEN": "t",
        "RAY_ADDRESS": "a",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "ours",
        "HF_TOKEN": "hf",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    other = inherited_environment(environ, own_interpreter=False)
    assert {k for k in other if k in environ} == {"HF_TOKEN", "CUDA_VISIBLE_DEVICES"}
    assert inherited_environment(environ, own_interpreter=True)["PYTHONPATH"] == "ours"


def test_secrets_are_scrubbed() -> None:
    values = secrets_of({"HF_TOKEN": "hf_123456", "PATH": "/usr/bin", "AWS_SECRET": "hf_1234567", "KEY": "1"})
    assert scrub("a hf_1234567 b hf_123456 /usr/bin 1", values) == "a *** b *** /usr/bin 1"


@pytest.mark.parametrize(
    ("end", "line", "reason"),
    [
        (Exit(code=1), "ValueError: x", "EngineExited"),
        (Exit(signal=9), "INFO ready", "EngineKilled"),
        (Exit(code=137), "INFO ready", "EngineKilled"),
        (Exit(code=1), "torch.OutOfMemoryError: CUDA out of memory.", "OutOfMemory"),
        (Exit(code=1), "ValueError: No available memory for the cache blocks.", "OutOfMemory"),
        (
            Exit(code=1),
            "OSError: x is not a local folder and is not a valid model identifier",
            "ModelNotFound",
        ),
        (Exit(code=2), "api_server.py: error: unrecognized arguments: --foo", "BadArguments"),
        (Exit(code=1), "OSError: [Errno 98] Address already in use", "PortInUse"),
        (Exit(code=1), "Model architectures ['X'] are not supported for now.", "ModelUnsupported"),
    ],
)
def test_reasons(end: Exit, line: str, reason: str) -> None:
    assert classify(end, ["INFO a", line, "INFO b"]) == reason


def test_a_message_holds_the_last_lines_and_is_bounded() -> None:
    text = describe("the engine ended", [f"line {n} " + "x" * 1000 for n in range(100)])
    assert "line 99" in text
    assert "line 50" not in text
    assert len(text) < 7000
    assert "logged nothing" in describe("the engine ended", [])


class TestGuard:
    def test_the_log_is_bounded(self, tmp_path: Path) -> None:
        log = guard.RotatingLog(str(tmp_path / "log"), max_bytes=1000)
        for number in range(200):
            log.write(b"%05d %s\n" % (number, b"x" * 90))
        sizes = [p.stat().st_size for p in tmp_path.iterdir()]
        assert len(sizes) == 2
        assert max(sizes) <= 1000
        assert (tmp_path / "log").read_text().splitlines()[-1].startswith("00199")

    async def test_lines_are_followed_over_a_rotation(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_text("of an earlier start\n")
        process = EngineProcess(path)
        process._remember_log_end()
        log = guard.RotatingLog(str(path), max_bytes=100)
        log.write(b"one\ntw")
        assert process.new_lines() == ["one"]
        log.write(b"o\n")
        assert process.new_lines() == ["two"]
        log.write(b"y" * 99 + b"\n")
        assert process.new_lines() == ["y" * 99]
        assert process.tail() == ["y" * 99]

    @pytest.mark.parametrize("command", [["/no/such/program"], ["/etc/passwd"]])
    async def test_a_command_that_can_not_be_run(self, tmp_path: Path, command: list[str]) -> None:
        process = EngineProcess(tmp_path / "log")
        await process.start(command, dict(os.environ), tmp_path)
        assert await process.wait() == Exit(code=127)
        assert command[0] in process.tail()[-1]
        await process.release()

    async def test_a_killed_guard_takes_the_engine_with_it(self, tmp_path: Path) -> None:
        process = EngineProcess(tmp_path / "log")
        await process.start(["sh", "-c", "sleep 1000 & sleep 1000"], dict(os.environ), tmp_path)
        parent = psutil.Process(process.pid).ppid()
        tree = [process.pid, *guard.descendants(process.pid)]
        os.kill(parent, 9)
        assert await process.wait() == Exit()
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in tree):
            assert time.monotonic() < deadline
        await process.release()

    def test_it_starts_quickly(self, tmp_path: Path) -> None:
        began = time.monotonic()
        line = [sys.executable, "-I", "-S", guard.__file__, "--", "true"]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read().count(b"\n") == 2
        assert time.monotonic() - began < 2.0


class TestArguments:
    def args(self, **changes: Any) -> dict[str, Any]:
        return {
            "namespace": "default",
            "deployment": "m",
            "model": "m",
            "variant": "a",
            "revision": "r1",
            "source": "file:///m",
            "registry": "http://127.0.0.1:1",
            "engine": {"type": "Simulator"},
        } | changes

    def test_what_is_reserved(self) -> None:
        app = pytest.importorskip("modelfleet_serving.app", reason="ray[serve] is not installed")
        resources = {"numCpus": 2, "numGpus": 1, "acceleratorType": "A10G", "resources": {"x": 1}}
        options = app.actor_options(app.parse_args(self.args(resources=resources)))
        assert options == {"num_cpus": 2, "num_gpus": 1, "accelerator_type": "A10G", "resources": {"x": 1}}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"engine": {"type": "Nope"}}, "Nope"),
            ({"engine": {"type": "Simulator", "maxModelLen": "x"}}, r"\$\.engine\.maxModelLen"),
            ({"variant": None}, r"\$\.variant"),
        ],
    )
    def test_errors_name_the_place(self, changes: dict[str, Any], message: str) -> None:
        app = pytest.importorskip("modelfleet_serving.app", reason="ray[serve] is not installed")
        with pytest.raises(ValueError, match=message):
            app.parse_args(self.args(**changes))
