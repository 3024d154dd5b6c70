"""Files as a store: everything at once, clashes, and live edits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from modelfleet_operator.api import InvalidResourcesError
from modelfleet_operator.local_state import AlreadyRunningError, LocalInfo, LocalState, NotRunningError
from modelfleet_operator.local_store import Resources, load, watch

DEPLOYMENT = """
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {{name: {name}}}
spec:
  model: {{source: "hf://o/n", name: {model}}}
  variants: [{{name: a}}]
"""


def write(path: Path, name: str = "m", model: str = "m") -> Path:
    path.write_text(DEPLOYMENT.format(name=name, model=model))
    return path


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder / "a.yaml", "a", "a")
    write(folder / "b.yml", "b", "b")
    (folder / "notes.txt").write_text("not a resource")
    single = write(tmp_path / "c.yaml", "c", "c")
    assert load([folder, single]).deployments.keys() == {"default/a", "default/b", "default/c"}


def test_every_problem_of_every_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("kind: Foo\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidResourcesError) as caught:
        load([broken, binary, tmp_path / "missing.yaml"])
    text = str(caught.value)
    assert "broken.yaml:1: kind: 'Foo'" in text
    assert "binary.yaml: can't be read" in text
    assert "missing.yaml: no such file or directory" in text


def test_two_deployments_may_not_claim_one_model(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "a", "same")
    write(tmp_path / "b.yaml", "b", "same")
    with pytest.raises(
        InvalidResourcesError, match="model name same is already taken by ModelDeployment default/a"
    ):
        load([tmp_path])


def test_one_name_stands_once(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "a", "x")
    write(tmp_path / "b.yaml", "a", "y")
    with pytest.raises(InvalidResourcesError, match="ModelDeployment default/a is already taken"):
        load([tmp_path])


async def test_edits_are_followed(tmp_path: Path) -> None:
    file = write(tmp_path / "m.yaml", "m", "before")
    changes = watch([file])
    first = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0.3)  # inotify has no event for "I am watching now"
    fresh = file.with_suffix(".new")
    fresh.write_text(DEPLOYMENT.format(name="m", model="after"))
    fresh.replace(file)  # as editors do
    change = await asyncio.wait_for(first, 10)
    assert isinstance(change, Resources)
    assert change.deployments["default/m"].model_name == "after"
    second = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0.1)
    file.write_text("kind: [")
    problem = await asyncio.wait_for(second, 10)
    assert isinstance(problem, InvalidResourcesError)
    await changes.aclose()  # type: ignore[attr-defined]


def test_one_up_at_a_time(tmp_path: Path) -> None:
    first, second = LocalState(tmp_path), LocalState(tmp_path)
    first.acquire()
    first.publish(LocalInfo(pid=1, router="http://127.0.0.1:8000"))
    with pytest.raises(AlreadyRunningError, match=r"pid 1, http://127\.0\.0\.1:8000"):
        second.acquire()
    assert second.read().router == "http://127.0.0.1:8000"
    first.release()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotRunningError):
        second.read()
    second.acquire()
    second.release()


def test_what_a_killed_up_left_counts_for_nothing(tmp_path: Path) -> None:
    LocalState(tmp_path).publish(LocalInfo(pid=2**22 + 1, router="http://127.0.0.1:8000"))
    with pytest.raises(NotRunningError):
        LocalState(tmp_path).read()
