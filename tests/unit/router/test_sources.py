"""Table files as people and tools write them: in pieces, badly, large."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.router.harness import Harness, harness, model, post, until

from modelfleet_serving.contract import TableUpdate
from modelfleet_serving.router.sources import FileSource, load_table
from modelfleet_serving.router.table import TableError

ENDPOINT = "{id: r, url: 'http://127.0.0.1:9'}"
TABLE = f"models:\n- name: a\n  variants: [{{name: v, endpoints: [{ENDPOINT}]}}]\n"


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfleet_serving.router.sources.POLL_SECONDS", 0.01)


@contextlib.asynccontextmanager
async def followed(path: Path) -> AsyncIterator[list[TableUpdate]]:
    updates: list[TableUpdate] = []

    async def apply(update: TableUpdate) -> None:
        updates.append(update)

    source = FileSource(path, apply)
    await source.start()
    task = asyncio.create_task(source.run())
    try:
        yield updates
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


BAD = [
    "",
    "   \n",
    "# nothing but a comment\n",
    "models:\n",
    "models: [",
    "models: 5",
    "[]",
    "null",
    "- a\n- b\n",
    "text",
    "models:\n- name: a\n  created: 2026-99-99\n",  # no date
    "models:\n- name: a\n  weights: &w {a: *w}\n",
    "models: " + "[" * 5000,
    "models:\n- name: !!python/object:os.system x\n",
    "models:\n- {name: a, variants: [{name: v, endpoints: [{id: r, url: 'http://x:99999'}]}]}\n",
    "models:\n- name: 5\n",
    "\x00\x01",
    "models:\n- name: a\n- name: a\n",
    '{"models": [{"name": "\\ud83d"}]}',
]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("text", BAD)
async def test_every_bad_table_is_a_named_fault(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"routes{suffix}"
    path.write_text(text)
    with pytest.raises(TableError, match=f"routes{suffix}"):
        await load_table(path)
    path.write_bytes(b"models: \xff\xfe")
    with pytest.raises(TableError):
        await load_table(path)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize(
    ("model", "place"),
    [
        ({"name": 5}, "models[1].name"),
        ({"name": "b", "weights": {"v": "x"}}, "models[1].weights[...]"),
        ({"name": "b", "variants": [{"name": "v", "endpoints": [{}]}]}, "models[1].variants[0].endpoints[0]"),
        ([], "models[1]"),
        ({"name": "a"}, "models[1].name"),
    ],
)
async def test_a_fault_names_its_place(tmp_path: Path, model: object, place: str, suffix: str) -> None:
    path = tmp_path / f"routes{suffix}"
    path.write_text(json.dumps({"models": [{"name": "a"}, model]}))
    with pytest.raises(TableError) as raised:
        await load_table(path)
    assert place in str(raised.value)


@pytest.mark.parametrize("text", ["models: []\n", "{}", '{"models": []}'])
async def test_an_empty_table_is_one_that_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(text)
    assert await load_table(path) == []


@pytest.mark.usefixtures("polls")
async def test_bad_tables_change_nothing_and_never_end_the_watch(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(TABLE)
    async with followed(path) as updates:
        for text in BAD[:10]:
            path.write_text(text)
            await asyncio.sleep(0.03)
        path.unlink()
        await asyncio.sleep(0.03)
        path.mkdir()
        await asyncio.sleep(0.03)
        path.rmdir()
        assert len(updates) == 1
        path.write_text(TABLE.replace("name: a", "name: b"))
        await until(lambda: len(updates) == 2)
        assert updates[-1].models[0].name == "b"


@pytest.mark.usefixtures("polls")
async def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    """Half of a YAML table is often a valid one, with half of the models."""
    path = tmp_path / "routes.yaml"
    path.write_text(TABLE)
    entry = TABLE.removeprefix("models:\n")
    async with followed(path) as updates:
        with path.open("w") as file:
            file.write("models:\n")
            for number in range(60):
                file.write(entry.replace("name: a", f"name: m{number}"))
                file.flush()
                await asyncio.sleep(0.004)
        await until(lambda: len(updates) == 2)
        assert len(updates[1].models) == 60


@pytest.mark.usefixtures("polls")
async def test_a_mounted_config_map_is_followed(tmp_path: Path) -> None:
    """Kubernetes swaps a symlink to a directory."""
    for version, name in (("1", "a"), ("2", "b")):
        (tmp_path / f"..v{version}").mkdir()
        (tmp_path / f"..v{version}" / "routes.yaml").write_text(TABLE.replace("name: a", f"name: {name}"))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "routes.yaml").symlink_to("..data/routes.yaml")
    async with followed(tmp_path / "routes.yaml") as updates:
        (tmp_path / "..new").symlink_to("..v2")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await until(lambda: len(updates) == 2)
        assert updates[1].models[0].name == "b"


def _large(models: int, endpoints: int, shift: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "name": f"m{m}",
            "variants": [
                {
                    "name": "v",
                    "endpoints": [
                        {"id": f"m{m}-{e + shift}", "url": f"http://127.0.0.1:{1 + e}/{m}"}
                        for e in range(endpoints)
                    ],
                }
            ],
        }
        for m in range(models)
    ]


async def test_ten_thousand_endpoints_change_without_a_pause(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with harness() as router:
        engine = await router.engine("r1")
        await router.table(model(a=[engine]), *_large(1000, 10))
        changed = tmp_path / "routes.json"
        changed.write_text(json.dumps({"models": [model(a=[engine]), *_large(1000, 10, shift=5)]}))
        longest = 0.0
        done = asyncio.Event()

        async def watch() -> None:
            nonlocal longest
            while not done.is_set():
                before = time.thread_time()  # other processes of this machine don't count
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - before)

        watching = asyncio.create_task(watch())
        gc.collect()
        gc.disable()  # it would walk all that the tests hold; a router has frozen what it began with
        request.addfinalizer(gc.enable)
        models = await load_table(changed)
        await router.hub.apply(TableUpdate(epoch="t", version=2, full=True, models=models))
        assert (await router.ask()).status == 200
        done.set()
        await watching
        assert longest < 0.05, longest
        answer = await router.ask(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert len(answer.json()["data"]) == 2002


async def test_endpoints_that_come_and_go_use_up_no_rows(router: Harness) -> None:
    engine = await router.engine("r1")
    allocator = router.hub.rows
    free = len(allocator._free)
    for number in range(50):
        table = model(a=[engine])
        table["variants"][0]["endpoints"] = [
            {"id": f"r{number}-{n}", "url": engine.url, "state": "Ready"} for n in range(20)
        ]
        await router.table(table)
        assert (await router.ask()).status == 200
    assert free - len(allocator._free) <= 45
    assert len(router.worker.connector._pools) <= 25


async def test_a_large_table_is_json(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    path.write_text(json.dumps({"models": _large(1000, 10)}))
    assert len(await load_table(path)) == 1000
    assert post()
