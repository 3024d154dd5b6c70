"""Makes an engine's environment: one installer at a time, used only once whole, with visible progress."""

from __future__ import annotations

import contextlib
import ctypes.util
import fcntl
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from modelfleet_serving.engines.base import Platform
from modelfleet_serving.environments import packages
from modelfleet_serving.environments.catalog import LOCKS, Recipe, engine_key, recipe_for
from modelfleet_serving.environments.errors import InstallError, UnsupportedPlatformError
from modelfleet_serving.environments.layout import (
    MARKER,
    EngineEnvironment,
    cache_root,
    detect_platform,
    directory,
    read_environment,
)

TAIL_LINES: Final = 15
HEARTBEAT_SECONDS: Final = 15.0
STEP_SECONDS: Final = 3600.0
_GIB: Final = 2**30
_PROGRESS: Final = re.compile(
    r"^\s*(Resolved|Prepared|Installed|Bytecode|vLLM |SGLang "
    r"|Downloading \S+ \(([5-9]\d|\d{3,})\.\d+MiB|Downloading \S+ \(.*GiB)"
)
"""Milestones: of the downloads only those of 50 MiB and more, which take the time."""
_HINTS: Final = (
    (re.compile(r"no space left on device|os error 28|errno 28", re.IGNORECASE), "the disk is full"),
    (
        re.compile(r"dns error|failed to lookup|name resolution|connection refused|network is unreachable"
                   r"|error sending request|failed to establish a new connection", re.IGNORECASE),
        "the package index can't be reached",
    ),
    (re.compile(r"no solution found|resolutionimpossible|no matching distribution", re.IGNORECASE),
     "no set of versions fits; is the version right?"),
)  # fmt: skip


def install(
    engine: str, version: str | None = None, *, force: bool = False, say: Callable[[str], None] = print
) -> EngineEnvironment:
    """The environment of an engine on this machine, made if it is not there.

    Args:
        engine: ``vllm`` or ``sglang``, in any case.
        version: The engine's version; the tested one by default.
        force: Make it anew even when it is whole.
        say: Gets each line of progress.

    Raises:
        EnvironmentsError: With a message for the user. The half-made environment is never used.
    """
    key, platform = engine_key(engine), detect_platform()
    recipe = recipe_for(key, platform)
    wanted = version or recipe.default_version
    target = directory(key, wanted, platform)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not force and (ready := read_environment(target)) is not None:
        return ready
    with _exclusive(target.with_name(f".{target.name}.lock"), say) as descriptor:
        # Whoever held the lock may have made it.
        if not force and (ready := read_environment(target)) is not None:
            return ready
        build = _Build(key, wanted, platform, recipe, target, say)
        build.inherited = (descriptor,)
        return _make(build)


def lock(engine: str) -> Path:
    """Resolve the exact versions of an engine's default version anew, for the platforms that use a lock.

    Raises:
        InstallError: The resolver failed.
        UnsupportedPlatformError: The engine has no CPU build.
    """
    key = engine_key(engine)
    recipe = recipe_for(key, Platform.CPU)
    path = LOCKS / f"{key}-{recipe.default_version}-cpu.txt"
    build = _Build(
        key, recipe.default_version, Platform.CPU, recipe, cache_root() / "engines" / "lock", print
    )
    build.target.mkdir(parents=True, exist_ok=True)
    arguments = ["--universal", "--python-version", "3.11", "--no-annotate", "--no-header"]
    text = build.run(
        "resolving", [build.require_uv(), "pip", "compile", *arguments, *build.resolver_arguments()]
    )
    made_by = f"python -m modelfleet_serving.environments lock {key}"
    title = f"# {key} {recipe.default_version} on a CPU. Made by: {made_by}"
    pins = [
        line for line in text if "==" in line and not re.search(r"; .*(== 'win32'|== 'emscripten')$", line)
    ]
    path.write_text("\n".join([title, *pins]) + "\n")
    return path


class _Build:
    """One environment in the making: its command lines, its log, its clock."""

    def __init__(
        self,
        engine: str,
        version: str,
        platform: Platform,
        recipe: Recipe,
        target: Path,
        say: Callable[[str], None],
    ) -> None:
        self.engine, self.version, self.platform = engine, version, platform
        self.recipe, self.target, self._say = recipe, target, say
        self.python = target / "bin" / "python"
        self.inherited: tuple[int, ...] = ()
        self.log = target.with_name(f"{target.name}.log")
        self.log.unlink(missing_ok=True)
        self._started = time.monotonic()
        self.uv = packages.find_uv()
        self.environ: dict[str, str] = dict(os.environ)
        if self.uv is not None:
            self.environ = packages.uv_environment(packages.pip_settings(), os.environ)

    def say(self, text: str) -> None:
        self._say(f"[{time.monotonic() - self._started:4.0f} s] {text}")

    def require_uv(self) -> str:
        if self.uv is None:
            raise UnsupportedPlatformError(
                f"{self.engine} {self.version} has no list of exact versions here, "
                "and resolving one needs uv: pip install uv"
            )
        return self.uv

    def run(self, step: str, command: Sequence[str]) -> list[str]:
        """Run one step, its output to the log and its milestones to the user; returns its lines."""
        return run_step(
            step, command, environ=self.environ, log=self.log, say=self.say, inherited=self.inherited
        )

    def resolver_arguments(self) -> list[str]:
        """Requirements, overrides and excludes as files beside the environment."""
        files = {"requirements": self.requirements(), "overrides": self.recipe.overrides,
                 "excludes": self.recipe.excludes}  # fmt: skip
        arguments = []
        for name, lines in files.items():
            path = self.target / f"{name}.in"
            path.write_text("".join(f"{line}\n" for line in lines))
            arguments += [str(path)] if name == "requirements" else [f"--{name}", str(path)]
        return arguments

    def requirements(self) -> list[str]:
        return [line.format(version=self.version) for line in self.recipe.requirements]


def _make(build: _Build) -> EngineEnvironment:
    _check_machine(build)
    build.say(
        f"making {build.engine} {build.version} for {build.platform.value} in {build.target} "
        f"(about {build.recipe.disk_gib:.0f} GiB)"
    )
    # What an interrupted install left can't be told from a whole package; the downloads are cached.
    if build.target.exists():
        shutil.rmtree(build.target)
    if build.uv is not None:
        build.run("making the environment", [build.uv, "venv", "--python", sys.executable, str(build.target)])
    else:
        build.run("making the environment", [sys.executable, "-m", "venv", str(build.target)])
    build.say("installing packages")
    build.run("installing packages", _install_command(build))
    build.say("importing the engine")
    build.run("importing the engine", [str(build.python), "-W", "ignore", "-c", build.recipe.verify])
    marker = {"engine": build.engine, "version": build.version, "platform": build.platform.value}
    staged = build.target / f"{MARKER}.new"
    staged.write_text(json.dumps(marker) + "\n")
    staged.replace(build.target / MARKER)
    build.say(f"ready: {build.python}")
    return EngineEnvironment(build.python, build.version, build.platform)


def _install_command(build: _Build) -> list[str]:
    pinned = build.recipe.lock(build.engine, build.platform, build.version)
    uv = build.uv
    # Bytecode now: or else the first start of the engine compiles it, within its start deadline.
    base = (
        [uv, "pip", "install", "--python", str(build.python), "--compile-bytecode"]
        if uv is not None
        else [str(build.python), "-m", "pip", "install", "--progress-bar", "off"]
    )
    if pinned is None:
        if build.recipe.overrides or build.recipe.excludes:
            build.require_uv()
            return [*base, "-r", *build.resolver_arguments()]
        return [*base, *build.requirements()]
    lines = pinned.read_text().splitlines()
    if _has_cpu_wheels(build):
        build.say("an index has builds without CUDA: taking those")
        lines = packages.without_cuda(lines, build.recipe.cpu_wheels, build.recipe.cuda_only)
    path = build.target / "requirements.txt"
    path.write_text("\n".join(lines) + "\n")
    return [*base, "--no-deps", "-r", str(path)]


def _has_cpu_wheels(build: _Build) -> bool:
    if build.uv is None or not build.recipe.cpu_wheels:
        return False
    command = [build.uv, "pip", "install", "--python", str(build.python), "--dry-run", "--no-deps"]
    asked = subprocess.run(
        [*command, *build.recipe.cpu_wheels], env=build.environ, capture_output=True, timeout=120, check=False
    )
    return asked.returncode == 0


def _check_machine(build: _Build) -> None:
    """Say what is missing before gigabytes are fetched."""
    missing = [
        package for name, package in build.recipe.libraries.items() if ctypes.util.find_library(name) is None
    ]
    if missing:
        raise UnsupportedPlatformError(
            f"{build.engine} needs system libraries that are missing here. "
            f"On Debian and Ubuntu: apt-get install {' '.join(missing)}"
        )
    free = shutil.disk_usage(build.target.parent).free / _GIB
    if free < build.recipe.disk_gib:
        raise UnsupportedPlatformError(
            f"{build.engine} needs about {build.recipe.disk_gib:.0f} GiB and {build.target.parent} has "
            f"{free:.1f} GiB free; MODELFLEET_CACHE=DIR puts it elsewhere"
        )


@contextlib.contextmanager
def _exclusive(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the file's lock, and yield its descriptor for the installers that are started meanwhile.

    They inherit it, and a lock is held until the last descriptor of it is closed: an installer that
    outlives us, because we were killed, still keeps the next install from the directory it writes to.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another install of it is running; waiting for that one")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def run_step(
    step: str,
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    log: Path,
    say: Callable[[str], None],
    inherited: Sequence[int] = (),
) -> list[str]:
    """Run one installer command, its whole output into ``log`` and its milestones to ``say``.

    Raises:
        InstallError: It could not be started, failed, or ran longer than an hour.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    lines: list[str] = []
    with log.open("a") as file:
        try:
            process = subprocess.Popen(
                command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=inherited,
            )  # fmt: skip
        except OSError as error:
            raise InstallError(step, str(error), [], log) from error
        try:
            for line in _Lines(process, step, say):
                file.write(line + "\n")
                tail.append(line)
                lines.append(line)
                if _PROGRESS.match(line):
                    say(line.strip())
            code = process.wait(timeout=STEP_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code != 0:
        text = "\n".join(lines)
        hint = next((hint for pattern, hint in _HINTS if pattern.search(text)), None)
        raise InstallError(step, hint, list(tail), log)
    return lines


class _Lines:
    """The lines of a running process; says that it still runs when it has been silent for a while."""

    def __init__(self, process: subprocess.Popen[str], step: str, say: Callable[[str], None]) -> None:
        self._step, self._say = step, say
        self._queue: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None  # noqa: S101 - opened with a pipe
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        while True:
            try:
                line = self._queue.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                self._say(f"still {self._step}")
                continue
            if line is None:
                raise StopIteration
            return line
