"""The data path as machine code, where this machine can make it: the same modules, compiled by mypyc.

What is in C is compiled with them.

``python -m modelfleet_serving.router_native`` compiles (about a minute, needs the extra ``native`` and a C
compiler) into ``$MODELFLEET_CACHE/router/KEY``, or the user's cache directory; with ``--system`` into the
environment of the interpreter, as the build of an image does. From then on :func:`use` finds it. The key is a
hash of the sources and the interpreter: changed sources are run as they are until they are compiled again,
never by an outdated library. ``MODELFLEET_ROUTER_NATIVE=0`` runs the sources in any case; ``1`` runs nothing
but the library for them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import platformdirs

PACKAGE: Final = Path(__file__).parent / "router"
# What runs for every request or chunk. Modules with msgspec structs can't be compiled, and needn't be:
# msgspec is C.
MODULES: Final = (
    "accesslog",
    "admission",
    "affinity",
    "builtin",
    "choice",
    "counters",
    "digits",
    "dispatch",
    "exchange",
    "failover",
    "health",
    "incoming",
    "known_heads",
    "meters",
    "opening",
    "peek",
    "poller",
    "relay",
    "reply",
    "request",
    "response",
    "routing",
    "sending",
    "server",
    "stored",
    "table",
    "tenancy",
    "transport",
    "upstream",
    "usage",
    "waiting",
    "worker",
    "policy/fingerprint",
    "policy/group",
    "policy/key_table",
    "policy/load",
    "policy/prefix_table",
    "policy/quota",
    "policy/recorder",
    "policy/split",
)
C_SOURCES: Final = (
    "wire.c",
    "shortcut.c",
    "tape.c",
    "peek.c",
    "prefixes.c",
    "hashing.c",
    "sizes.c",
    "quota.c",
)
C_HEADERS: Final = ("wire.h",)
# What setuptools is told to make of it.
_SETUP: Final = """
from setuptools import Extension, setup
setup(
    name="wire",
    script_args=["--quiet", "build_ext", "--inplace"],
    ext_modules=[Extension("{module}", {sources}, extra_compile_args=["-O2", "-D_GNU_SOURCE"])],
)
"""
_CONFIGURATION: Final = """
[tool.mypy]
python_version = "{version}"
explicit_package_bases = true
[[tool.mypy.overrides]]
module = ["httptools.*", "ray.*", "yaml.*"]
ignore_missing_imports = true
follow_imports = "skip"
"""
_DONE: Final = "complete"


def _root() -> Path:
    configured = os.environ.get("MODELFLEET_CACHE")
    base = (
        Path(configured).expanduser().absolute() if configured else platformdirs.user_cache_path("modelfleet")
    )
    return base / "router"


def _system_root() -> Path:
    return Path(sys.prefix) / "lib" / "modelfleet-router"


@cache
def _key() -> str:
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()} {sys.flags.optimize}".encode())
    for module in MODULES:
        digest.update(module.encode() + b"\0" + (PACKAGE / f"{module}.py").read_bytes())
    for name in C_SOURCES + C_HEADERS:
        digest.update(name.encode() + b"\0" + (PACKAGE / name).read_bytes())
    return digest.hexdigest()[:20]


@cache
def _found() -> Path | None:
    """Where the library for these very sources and this interpreter is."""
    if os.environ.get("MODELFLEET_ROUTER_NATIVE") == "0":
        return None
    for root in (_system_root(), _root()):
        try:
            if (root / _key() / _DONE).exists():
                return root / _key()
        except OSError:
            continue
    return None


def available() -> bool:
    """Whether compiled modules for these sources exist and are wanted."""
    return _found() is not None


def use(search: list[str], package: str) -> None:
    """Lets a package's ``__path__`` begin with its compiled modules, where there are any."""
    found = _found()
    if found is None:
        if os.environ.get("MODELFLEET_ROUTER_NATIVE") == "1":
            message = "MODELFLEET_ROUTER_NATIVE=1, but the data path is not compiled for these sources and"
            raise RuntimeError(f"{message} {sys.executable}: run python -m modelfleet_serving.router_native")
        return
    if str(found) not in sys.path:
        sys.path.append(str(found))  # for the library that the modules share
    search.insert(0, str(found.joinpath(*package.split("."))))


def build(*, system: bool = False) -> Path:
    """Compiles the modules unless that was done; returns the directory.

    Args:
        system: For all users of this interpreter's environment.

    Raises:
        RuntimeError: with the compiler's words.
    """
    target = (_system_root() if system else _root()) / _key()
    if (target / _DONE).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        root = Path(scratch)
        top = root / PACKAGE.parent.name
        shutil.copytree(PACKAGE.parent, top, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        (root / "pyproject.toml").write_text(_CONFIGURATION.format(version=version))
        sources = [f"{PACKAGE.parent.name}/{PACKAGE.name}/{module}.py" for module in MODULES]
        environment = {**os.environ, "MODELFLEET_ROUTER_NATIVE": "0", "MYPYC_OPT_LEVEL": "3"}
        package = f"{PACKAGE.parent.name}/{PACKAGE.name}"
        setup = _SETUP.format(
            module=f"{package.replace('/', '.')}._wire", sources=[f"{package}/{name}" for name in C_SOURCES]
        )
        for name, command in (("mypyc", ["-m", "mypyc", *sources]), ("the C compiler", ["-c", setup])):
            done = subprocess.run(
                [sys.executable, *command],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=900,
            )
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        result = root / "result"
        built = [path for path in root.rglob("*.so") if path.relative_to(root).parts[0] != "build"]
        for library in built:
            place = result / library.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(library, place)
        (result / _DONE).touch()
        if not target.exists():
            result.rename(target)
    return target


def main() -> int:
    """Entry point of the compilation."""
    print("compiling the router's data path, about a minute", flush=True)
    try:
        print(build(system="--system" in sys.argv[1:]))
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(f"the data path stays interpreted: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
