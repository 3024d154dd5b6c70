"""The whole path with simulated engines, quick enough to run often."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import openai
import psutil
import pytest
from tests.e2e.platform import Platform, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def variant_of(platform: Platform, model: str) -> str:
    answer = platform.client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2
    )
    return str(answer.headers["x-modelfleet-variant"])


def test_get_shows_what_runs(simulated: Platform) -> None:
    table = simulated.run("get", "sim").stdout
    assert "sim" in table
    assert "2/2" in table
    document = json.loads(simulated.run("get", "sim", "-o", "json").stdout)
    assert {c["type"]: c["status"] for c in document["status"]["conditions"]} == {
        "Accepted": "True", "Fits": "True", "Progressing": "False", "Serving": "True", "Ready": "True",
        "Suspended": "False",
    }  # fmt: skip


def test_chat_command_streams(simulated: Platform) -> None:
    done = simulated.run("chat", "sim:a", "Hello there", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    wrong = simulated.run("chat", "sim:c", "Hello")
    assert wrong.returncode == 1
    assert "404" in wrong.stderr
    assert "its variants are: a, b" in wrong.stderr


def test_unknown_models_are_told_what_exists(simulated: Platform) -> None:
    with pytest.raises(openai.NotFoundError, match="sim"):
        variant_of(simulated, "nothing")


def test_a_changed_weight_moves_traffic_and_touches_no_engine(simulated: Platform) -> None:
    before = simulated.variants()
    simulated.edit(r"weights: \{[^}]*\}", "weights: {a: 0, b: 100}")
    until(
        "all traffic on b", lambda: Counter(variant_of(simulated, "sim") for _ in range(10)) == {"b": 10}, 20
    )
    assert [v["revision"] for v in simulated.variants().values()] == [v["revision"] for v in before.values()]
    simulated.edit(r"weights: \{[^}]*\}", "weights: {a: 30, b: 70}")
    until("traffic on a again", lambda: "a" in [variant_of(simulated, "sim") for _ in range(10)], 20)


def test_a_changed_engine_field_makes_a_new_revision_without_a_lost_request(simulated: Platform) -> None:
    before = simulated.variants()["a"]["revision"]
    simulated.edit(r"type: Simulator,", "type: Simulator, maxNumSeqs: 64,")

    def rolled_out() -> bool:
        assert variant_of(simulated, "sim:a") == "a"
        row = simulated.variants()["a"]
        return row["revision"] != before and row["reason"] == "Serving"

    until("the new revision serves", rolled_out, 90)


def test_an_adapter_comes_and_goes_and_touches_no_engine(simulated: Platform, tmp_path: Path) -> None:
    before = {name: row["revision"] for name, row in simulated.variants().items()}
    good = simulated.file.read_text()
    simulated.edit(r"  routing:", f"  adapters: [{{name: style, source: 'file://{tmp_path}'}}]\n  routing:")

    def has_it() -> bool:
        try:
            return variant_of(simulated, "style") in before
        except openai.APIStatusError:
            return False

    until("the adapter answers", has_it, 30)
    simulated.wait_ready("a", "b", seconds=30)
    assert "style" in {m.id for m in simulated.client.models.list()}
    assert {name: row["revision"] for name, row in simulated.variants().items()} == before
    simulated.edit(str(tmp_path), "/nowhere/at/all")
    until(
        "what is wrong is told",
        lambda: (
            {(r["reason"], "/nowhere/at/all" in r["message"]) for r in simulated.variants().values()}
            == {("AdapterNotLoaded", True)}
        ),
        30,
    )
    assert variant_of(simulated, "sim:a") == "a", "the model serves on"
    simulated.file.write_text(good)
    simulated.wait_ready("a", "b", seconds=30)
    until("the adapter is gone", lambda: "style" not in {m.id for m in simulated.client.models.list()}, 20)


def test_a_broken_edit_changes_nothing(simulated: Platform) -> None:
    good = simulated.file.read_text()
    simulated.edit(r"fallback: \[b, a\]", "fallback: [b, zzz]")
    until("the problem is named", lambda: "routing.fallback must name variants" in simulated.log(), 20)
    assert variant_of(simulated, "sim:a") == "a"
    simulated.file.write_text(good)


def test_models_lists_models_and_variants(simulated: Platform) -> None:
    ids = {m.id for m in simulated.client.models.list()}
    assert {"sim", "sim:a", "sim:b"} <= ids


def test_nothing_listens_beyond_loopback(simulated: Platform) -> None:
    listening: set[str] = set()
    for process in simulated.tree():
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray starts and ends workers as it likes
            listening |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"}
    assert "127.0.0.1" in listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def test_ray_and_the_registry_ask_for_the_token(simulated: Platform) -> None:
    info = json.loads((simulated.state / "state.json").read_bytes())
    for url in (f"{info['dashboard']}/api/serve/applications/", f"{info['registry']}/v1/state"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=10)
        assert refused.value.code in (401, 403)
        refused.value.close()


def test_a_second_up_is_told_of_the_first(simulated: Platform) -> None:
    second = simulated.run("up", "-f", str(simulated.file))
    assert second.returncode == 1
    assert f"pid {simulated.process.pid}" in second.stderr
    assert simulated.process.poll() is None


def test_interrupt_leaves_nothing_running(simulated: Platform) -> None:
    assert len(simulated.tree()) > 3
    assert simulated.interrupt() == 0
    assert simulated.tree() == []
    assert not (simulated.state / "state.json").exists()
    assert not (simulated.state / "up.lock").exists()
    gone = simulated.run("get")
    assert gone.returncode == 1
    assert "no `modelfleet up` runs" in gone.stderr
