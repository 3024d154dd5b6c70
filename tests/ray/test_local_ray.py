"""The local cluster itself: it ends with whoever started it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.ray.conftest import until

from modelfleet_operator.clients.local_ray import LocalRay, LocalRayError


def processes_of(ray: LocalRay) -> list[psutil.Process]:
    """Everything that was started with this cluster's environment."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("RAY_AUTH_TOKEN_PATH") == str(ray.token_file)
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


async def test_nothing_is_left_when_its_owner_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib
from modelfleet_operator.clients.local_ray import LocalRay
async def main():
    await LocalRay(pathlib.Path({str(tmp_path)!r}), cpus=1, gpus=0).start()
    print("started", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    ray = LocalRay(tmp_path)
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    try:
        assert await asyncio.wait_for(owner.stdout.readline(), 90) == b"started\n"
        assert len(processes_of(ray)) > 5
        assert ray.temp_dir.exists()
    finally:
        owner.kill()
        await owner.wait()
    await until(lambda: not processes_of(ray), "all processes have ended", 8)
    await until(lambda: not ray.temp_dir.exists(), "Ray's files are removed", 5)


async def test_a_start_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfleet_operator.clients.local_ray._ATTEMPTS", 1)
    ray = LocalRay(tmp_path, resources={"CPU": 1}, gpus=0)  # Ray takes CPUs as --num-cpus alone
    with pytest.raises(LocalRayError, match="CPU"):
        await ray.start()
    assert not processes_of(ray)
    assert not ray.temp_dir.exists()
