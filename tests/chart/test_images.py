"""The Dockerfiles: what they copy is there and sent along, and what they install suffices."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.chart.rendered import ROOT

from modelfleet_operator.catalog.engines import default_version

PACKED = (".py", ".yaml", ".json", ".jinja", ".txt", ".c", ".h")
DOCKERFILES = [ROOT / "Dockerfile", *sorted((ROOT / "docker").glob("*.Dockerfile"))]


def instructions(file: Path) -> list[str]:
    """The instructions, each in one line."""
    text = re.sub(r"\\\n", " ", file.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def sources(file: Path) -> set[str]:
    found: set[str] = set()
    for line in instructions(file):
        words = line.split()
        if words[0] == "COPY" and not words[1].startswith("--from"):
            found |= {w.rstrip("/") for w in words[1:-1]}
    return found


def sent() -> set[str]:
    """Top-level names that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*", "what is not named is not sent"
    return {line.removeprefix("!").rstrip("/") for line in lines if line.startswith("!")}


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def test_what_is_copied_is_there_and_sent(dockerfile: Path) -> None:
    for source in sources(dockerfile):
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in sent(), f"{source} is kept back by .dockerignore"


def test_nothing_is_sent_in_vain() -> None:
    used = {source.split("/")[0] for file in DOCKERFILES for source in sources(file)}
    assert sent() == used


def test_hadolint_is_content(dockerfile: Path) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [linter, "--no-color", "--config", ROOT / ".hadolint.yaml", dockerfile],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_runs_as_a_user_that_the_pods_ask_for(dockerfile: Path) -> None:
    users = [line.split()[1] for line in instructions(dockerfile) if line.startswith("USER ")]
    assert users[-1:] == ["1000"]


def test_no_step_hides_a_failure(dockerfile: Path) -> None:
    for line in instructions(dockerfile):
        assert "|| true" not in line


def test_the_router_is_compiled_in_the_build_stage_alone() -> None:
    """The image has the compiled data path, and neither compiler nor mypyc."""
    build, final = "\n".join(instructions(ROOT / "Dockerfile")).split("\nFROM ")
    compiled = build.index("-m modelfleet_serving.router_native --system")
    assert build.index("--no-deps .") < compiled, "what is compiled must be what is installed"
    assert "gcc" in build
    assert "--target /opt/native --requirement requirements/native.txt" in build
    assert "gcc" not in final
    assert "/opt/native" not in final
    assert "COPY --from=build /opt/modelfleet /opt/modelfleet" in final


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_engine_images_hold_the_default_version(engine: str) -> None:
    text = (ROOT / "docker" / f"{engine.lower()}.Dockerfile").read_text()
    assert f"ARG {engine.upper()}_VERSION={default_version(engine)}\n" in text


IMPORTS = {
    "operator": ["modelfleet_operator.main", "modelfleet_operator.cli", "modelfleet_operator.crds_command"],
    "router": ["modelfleet_serving.router.__main__"],
    "tracing": ["opentelemetry.exporter.otlp.proto.http.trace_exporter"],
    "native": ["mypyc.build", "setuptools"],
    "models": ["modelfleet_operator.clients.model_hub"],
}


@functools.cache
def uv_environment() -> dict[str, str]:
    """uv reads no pip.conf: it is told of an index that pip was given there."""
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    found = subprocess.run(pip, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL") or found
    return {**os.environ, **({"UV_DEFAULT_INDEX": index} if index else {})}


def uv(*arguments: str | Path) -> None:
    command = [Path(sys.executable).parent / "uv", *arguments]
    done = subprocess.run(
        command, env=uv_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IMPORTS)
def test_locked_requirements_suffice(name: str, tmp_path: Path) -> None:
    """In a fresh environment with nothing but the lock, as in the image."""
    python = tmp_path / "venv" / "bin" / "python"
    uv("venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    lock = ROOT / "requirements" / f"{name}.txt"
    uv("pip", "install", "--quiet", "--python", python, "--requirement", lock)
    code = "; ".join(f"import {module}" for module in IMPORTS[name])
    path = f"{ROOT / 'operator'}:{ROOT / 'serving'}"
    environment = {"PYTHONPATH": path, "HOME": str(tmp_path)}
    done = subprocess.run(
        [python, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
def test_package_holds_its_data(tmp_path: Path) -> None:
    """A wheel of the files that Docker gets, not the editable installation, has catalogues and profiles."""
    context, wheels = tmp_path / "context", tmp_path / "wheels"
    context.mkdir()
    for name in sent():
        source = ROOT / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, context / name, ignore=skipped)
        else:
            shutil.copy(source, context / name)
    uv("build", "--quiet", "--wheel", "--out-dir", wheels, context)
    (wheel,) = wheels.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for package in ("operator/modelfleet_operator", "serving/modelfleet_serving"):
        root = ROOT / package
        for file in root.rglob("*"):
            if (
                file.suffix in (".py", ".yaml", ".json", ".jinja", ".txt", ".c", ".h")
                or file.name == "py.typed"
            ):
                assert str(file.relative_to(root.parent)) in packed
