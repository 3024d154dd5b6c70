"""The whole path through kubectl: a real API server, the operator under kopf, real Ray, simulated engines."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from tests.controlplane.bed import CommandError, ControlPlane
from tests.controlplane.operator.platform import ClusterPlatform
from tests.e2e.platform import until

pytestmark = [pytest.mark.e2e, pytest.mark.controlplane, pytest.mark.timeout(180)]

NAMESPACE = "team"
MODEL = """\
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {name: sim}
spec:
  model: {source: "hf://none/simulated"}
  engine:
    type: Simulator
    args: {decode-base-ms: 20}
  variants:
  - name: a
    accelerators: [{type: CPU}]
  - name: b
    accelerators: [{type: CPU}]
  routing:
    weights: {a: 50, b: 50}
    fallback: [b, a]
  rollout: {drainTimeout: 60s}
"""


class Model:
    """The ModelDeployment as its owner sees it: kubectl and the openai client."""

    def __init__(self, platform: ClusterPlatform) -> None:
        self.platform = platform
        self.client = openai.OpenAI(base_url=f"{platform.url}/v1", api_key="none", max_retries=0, timeout=60)

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        return self.platform.cluster.kubectl(*arguments, "-n", NAMESPACE, input=text)

    def patch(self, spec: dict[str, Any]) -> None:
        self.kubectl("patch", "mdep", "sim", "--type=merge", "-p", json.dumps({"spec": spec}))

    def variants(self) -> dict[str, dict[str, Any]]:
        status = json.loads(self.kubectl("get", "mdep", "sim", "-o", "json"))["status"]
        return {v["name"]: v for v in status["variants"]}

    def answered_by(self, model: str = "sim") -> str:
        answer = self.client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2
        )
        assert answer.parse().choices[0].message.content
        return str(answer.headers["x-modelfleet-variant"])

    def engines(self) -> list[psutil.Process]:
        """Engine processes of this platform, by the log directory that Ray's environment names."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("MODELFLEET_LOG_DIR") == str(self.platform.ray.engine_logs)
                if ours and "modelfleet_serving.simulator" in process.cmdline():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found


@pytest.fixture(scope="module")
def model(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The platform with the ModelDeployment ready."""
    control_plane.kubectl("create", "namespace", NAMESPACE)
    directory = tmp_path_factory.mktemp("cluster")
    with ClusterPlatform(control_plane, directory, namespace=NAMESPACE, cpus=8) as platform:
        model = Model(platform)
        model.kubectl("apply", "-f", "-", text=MODEL)
        try:
            model.kubectl("wait", "mdep/sim", "--for=condition=Ready", "--timeout=50s")
        except CommandError as error:
            raise AssertionError(
                f"{error}\n{model.kubectl('get', 'mdep,events')}\n{platform.log()}"
            ) from None
        yield model


def test_what_is_ready_answers_at_once(model: Model) -> None:
    table = model.kubectl("get", "mdep")
    assert table.split()[:7] == ["NAME", "MODEL", "VARIANTS", "READY", "SERVING", "REASON", "AGE"]
    assert table.split()[7:13] == ["sim", "sim", "a,b", "2/2", "True", "AllVariantsReady"]
    assert {m.id for m in model.client.models.list()} >= {"sim", "sim:a", "sim:b"}
    assert [model.answered_by(f"sim:{variant}") for variant in "ab"] == ["a", "b"]
    assert set(Counter(model.answered_by() for _ in range(40))) == {"a", "b"}


def test_a_changed_weight_moves_traffic_and_touches_no_engine(model: Model) -> None:
    before = sorted(p.pid for p in model.engines())
    assert len(before) >= 2
    model.patch({"routing": {"weights": {"a": 0, "b": 100}}})
    until("all traffic on b", lambda: {model.answered_by() for _ in range(10)} == {"b"}, 10)
    model.patch({"routing": {"weights": {"a": 100, "b": 0}}})
    until("all traffic on a", lambda: {model.answered_by() for _ in range(10)} == {"a"}, 10)
    assert sorted(p.pid for p in model.engines()) == before


def test_an_edited_variant_lets_a_running_stream_end_whole(model: Model) -> None:
    before = model.variants()["a"]["revision"]
    tokens = 1000  # at 20 ms each: longer than the new revision takes
    stream = model.client.chat.completions.create(
        model="sim:a",
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    read: list[Any] = []
    reader = threading.Thread(target=lambda: read.extend(chunks), name="reader")
    reader.start()
    model.patch({"variants": [
        {"name": "a", "engine": {"maxNumSeqs": 64}, "accelerators": [{"type": "CPU"}]},
        {"name": "b", "accelerators": [{"type": "CPU"}]},
    ]})  # fmt: skip

    def rolled_out() -> bool:
        assert model.answered_by("sim:a") == "a", "no request is lost on the way"
        row = model.variants()["a"]
        return row["revision"] != before and row["reason"] == "Serving"

    until("the new revision serves", rolled_out, 60)
    assert reader.is_alive(), "the stream was over before the old revision went"
    reader.join(timeout=40)
    assert not reader.is_alive()
    finish = [c.choices[0].finish_reason for c in read if c.choices and c.choices[0].finish_reason]
    assert finish == ["length"]
    assert [c.usage.completion_tokens for c in read if c.usage] == [tokens]


def test_a_deleted_model_leaves_nothing(model: Model) -> None:
    assert model.engines()
    model.kubectl("delete", "mdep", "sim", "--timeout=60s")
    assert model.kubectl("get", "mdep", "--ignore-not-found") == ""
    until("no engine", lambda: not model.engines(), 20)

    def names() -> set[str]:
        return {m.id for m in model.client.models.list()}

    until("the router knows it no more", lambda: not names(), 10)
    with pytest.raises(openai.NotFoundError, match="sim"):
        model.answered_by()

    def pool() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(model.kubectl("get", "servingpool", "default", "-o", "json"))
        return found["status"]

    until("nobody uses the pool", lambda: not pool().get("usedBy"), 10)
    model.kubectl("delete", "servingpool", "default", "--timeout=30s")


def test_the_logs_have_no_traceback(model: Model, tmp_path: Path) -> None:
    assert "Traceback" not in model.platform.operator.text()
    assert "Traceback" not in (model.platform.directory / "router.log").read_text()
