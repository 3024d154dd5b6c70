"""Applications in a real Ray Serve, engines and registry included."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time

import aiohttp
import psutil
import pytest
from tests.ray.conftest import START_SECONDS, Cluster, Follower, until

from modelfleet_serving.contract import Adapter, Heartbeat, ReplicaConfig

# The first test waits for Ray and a registry to start: a minute or two beside the chart's control plane.
pytestmark = pytest.mark.timeout(300)
STREAM_TOKENS = 300


async def stream(url: str, model: str, started: asyncio.Event) -> str:
    """A streamed completion of several seconds."""
    body = {
        "model": model,
        "prompt": "Count.",
        "max_tokens": STREAM_TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    async with aiohttp.ClientSession() as session, session.post(url + "/v1/completions", json=body) as answer:
        text = ""
        async for line in answer.content:
            text += line.decode()
            started.set()
    return text


def engine_of(cluster: Cluster, beat: Heartbeat) -> psutil.Process:
    """The engine's process, found by its port."""
    port = beat.url.rpartition(":")[2]
    found = cluster.processes("modelfleet_serving.simulator")
    lines = {process: process.cmdline() for process in found}
    (engine,) = (p for p, line in lines.items() if port in " ".join(line) and "--log" not in line)
    return engine


async def actor_of(cluster: Cluster, application: str) -> psutil.Process:
    """The one actor of an application; one that an earlier test scaled away may still be on its way out."""
    name = f"ServeReplica:{application}:"
    await until(lambda: len(cluster.processes(name)) == 1, f"one process {name}")
    (process,) = cluster.processes(name)
    return process


@pytest.fixture
async def one(cluster: Cluster) -> Heartbeat:
    """The one ready replica of the application that most tests share."""
    cluster.set("one")
    await cluster.apply()
    await until(cluster.answers, "the registry answers", START_SECONDS)
    await cluster.route("one")
    (beat,) = await cluster.ready("one", 1)
    return beat


async def test_it_becomes_ready_and_is_routed(cluster: Cluster, follower: Follower, one: Heartbeat) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", one.url)
    assert one.node == "127.0.0.1"
    await until(lambda: follower.ready() == {one.id}, "routers know it")
    for process in cluster.processes(""):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray starts and ends workers as it likes
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip.removeprefix("::ffff:") == "127.0.0.1", process.cmdline()


async def test_the_registry_asks_for_the_clusters_token(cluster: Cluster, one: Heartbeat) -> None:
    async with aiohttp.ClientSession() as session:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            async with session.get(cluster.registry + "/v1/state", headers=headers) as answer:
                assert answer.status == 401


async def test_streams_end_whole_when_replicas_leave(
    cluster: Cluster, follower: Follower, one: Heartbeat
) -> None:
    cluster.set("one", replicas=2)
    await cluster.apply()
    both = await cluster.ready("one", 2)
    await until(lambda: follower.ready() == {b.id for b in both}, "routers know both")
    started = [asyncio.Event() for _ in both]
    streams = [asyncio.create_task(stream(b.url, "one", e)) for b, e in zip(both, started, strict=True)]
    for event in started:
        await asyncio.wait_for(event.wait(), 20)
    cluster.set("one", replicas=1)
    await cluster.apply()
    await until(lambda: len(follower.ready()) == 1, "routers know that one leaves")
    assert not any(s.done() for s in streams), "too short to tell"
    for text in await asyncio.wait_for(asyncio.gather(*streams), 60):
        assert text.rstrip().endswith("data: [DONE]")
        assert text.count("data: {") >= STREAM_TOKENS
    (left,) = await cluster.ready("one", 1)
    assert follower.ready() == {left.id}


async def test_adapters_come_and_go_while_the_engine_runs(cluster: Cluster, one: Heartbeat) -> None:
    def adapter(name: str) -> Adapter:
        cluster.folder.joinpath(name).mkdir(exist_ok=True)
        return Adapter(name=name, source=f"file://{cluster.folder}/{name}")

    async def configure(*adapters: Adapter) -> None:
        cluster.set(
            "lora", config=ReplicaConfig(adapters=list(adapters)), engine={"type": "Simulator", "lora": {}}
        )
        await cluster.apply()

    async def has(*names: str) -> Heartbeat | None:
        (beat,) = await cluster.replicas("lora")
        return beat if beat.adapters == list(names) else None

    async def answers(url: str, model: str) -> int:
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        status, _ = await cluster.call("POST", url + "/v1/completions", body)
        return status

    await configure(adapter("first"))
    (before,) = await cluster.ready("lora", 1)
    assert before.adapters == ["first"], "it is ready with its adapters"
    await configure(adapter("first"), adapter("second"))
    now = await until(lambda: has("first", "second"), "the second is loaded", START_SECONDS)
    assert (now.id, now.url, now.restarts) == (before.id, before.url, 0), "the same engine"
    assert await answers(now.url, "second") == 200
    await configure(adapter("second"))
    await until(lambda: has("second"), "the first is unloaded", START_SECONDS)
    assert await answers(now.url, "first") == 404
    os.kill(engine_of(cluster, now).pid, signal.SIGKILL)

    async def back() -> bool:
        (beat,) = await cluster.replicas("lora")
        return beat.restarts == 1 and beat.state == "Ready" and beat.adapters == ["second"]

    await until(back, "an engine that was started again has them, too", START_SECONDS)
    del cluster.applications[before.application]
    await cluster.apply()


async def test_a_killed_actor_takes_its_engine_with_it(cluster: Cluster, one: Heartbeat) -> None:
    engine = engine_of(cluster, one)
    (await actor_of(cluster, one.application)).kill()
    began = time.monotonic()
    await until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "it is gone", 2.0)
    assert time.monotonic() - began < 2.0

    async def replaced() -> bool:
        return {b.id == one.id for b in await cluster.replicas("one") if b.state == "Ready"} == {False}

    async def missed() -> bool:
        return one.id not in {b.id for b in await cluster.replicas("one")}

    await until(
        missed, "the dead one is dropped long before its lease of 10 s ends", began + 6 - time.monotonic()
    )
    await until(replaced, "Serve has started another", START_SECONDS)


async def test_a_killed_engine_comes_back(cluster: Cluster, follower: Follower, one: Heartbeat) -> None:
    seen: list[Heartbeat] = []
    os.kill(engine_of(cluster, one).pid, signal.SIGKILL)

    async def back() -> bool:
        seen.extend(await cluster.replicas("one"))
        return seen[-1].restarts == 1 and seen[-1].state == "Ready"

    await until(back, "it is back", 30)
    failed = next(b for b in seen if b.state == "Failed")
    assert failed.reason == "EngineKilled"
    assert "the last lines of its log" in failed.message
    assert len(failed.message.splitlines()) > 1
    assert {b.id for b in seen} == {one.id}, "in the same replica"
    await until(lambda: follower.ready() == {one.id}, "routers know it again")


async def test_a_registry_that_restarts_loses_no_live_endpoint(
    cluster: Cluster, follower: Follower, one: Heartbeat
) -> None:
    await until(lambda: follower.ready() == {one.id}, "routers know it")
    before, updates = follower.update.epoch, len(follower.history)
    (await actor_of(cluster, "modelfleet.registry")).kill()

    async def back() -> bool:
        return await cluster.answers() and (await cluster.state()).epoch != before

    await until(back, "another registry answers", START_SECONDS)
    assert (await cluster.state()).warming
    await cluster.route("one")
    await until(lambda: follower.update.epoch != before, "it publishes a table")
    assert all(ready == {one.id} for ready in follower.history[updates:])
    (same,) = await cluster.ready("one", 1)
    assert same.id == one.id


async def test_an_engine_that_can_not_start_says_why(cluster: Cluster, one: Heartbeat) -> None:
    settings = {"type": "Simulator", "env": {"PYTHONHOME": "/nowhere", "SOME_API_KEY": "sk-1234567890"}}
    name = cluster.set("bad", engine=settings)
    missing = cluster.set("missing", source="file:///no/such/model")
    await cluster.apply()

    async def failed() -> dict[str, Heartbeat] | None:
        beats = {b.model: b for b in (await cluster.state()).endpoints if b.reason}
        return beats if beats.keys() >= {"bad", "missing"} else None

    beats = await until(failed, "both have failed", START_SECONDS)
    assert (beats["bad"].reason, beats["missing"].reason) == ("EngineExited", "ModelNotFound")
    assert "No module named 'encodings'" in beats["bad"].message
    assert "/no/such/model" in beats["missing"].message
    del cluster.applications[name], cluster.applications[missing]
    await cluster.apply()
    await until(lambda: _only(cluster, {"one"}), "they are removed")


async def test_a_removed_application_drains(cluster: Cluster, follower: Follower, one: Heartbeat) -> None:
    started = asyncio.Event()
    running = asyncio.create_task(stream(one.url, "one", started))
    await asyncio.wait_for(started.wait(), 20)
    del cluster.applications[one.application]
    await cluster.apply()
    await until(lambda: follower.ready() == set(), "routers know that it leaves")
    assert not running.done(), "too short to tell"
    assert (await asyncio.wait_for(running, 60)).rstrip().endswith("data: [DONE]")
    await until(lambda: _only(cluster, set()), "it has said goodbye")
    await until(lambda: not cluster.processes("modelfleet_serving.simulator"), "its engine has ended")


async def _only(cluster: Cluster, models: set[str]) -> bool:
    return {b.model for b in (await cluster.state()).endpoints} == models
