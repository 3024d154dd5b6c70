"""`modelfleet plan`: exit codes, JSON in the words of status, a table that says why."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import yaml
from tests.unit.planner.measured import config

from modelfleet_operator.cli import main
from modelfleet_operator.clients.model_hub import ModelHub
from modelfleet_operator.plan_command import PlanOptions, run_plan

POOL = """
apiVersion: modelfleet.io/v1alpha1
kind: ServingPool
metadata: {name: default}
spec:
  ray: {cluster: {}}
  accelerators:
  - {type: A10, gpusPerNode: 1, minNodes: 2, maxNodes: 2}
  - {type: T4, gpusPerNode: 1, minNodes: 0, maxNodes: 4, spot: true}
"""
DEPLOYMENT = """
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {{name: qwen}}
spec:
  model: {{source: "file://{bf16}"}}
  engine: {{maxModelLen: 8192}}
  variants:
  - name: bf16
    accelerators: [{{type: A10}}]
  - name: awq
    source: "file://{awq}"
    quantization: {quantization}
    accelerators: [{{type: T4}}]
"""


@pytest.fixture
def hub(tmp_path: Path) -> ModelHub:
    return ModelHub(cache_directory=tmp_path / "cache")


def files(tmp_path: Path, quantization: str = "AWQ") -> tuple[Path, Path]:
    paths = {}
    for name, model in (("bf16", "Qwen/Qwen2.5-7B-Instruct"), ("awq", "Qwen/Qwen2.5-7B-Instruct-AWQ")):
        paths[name] = tmp_path / name
        paths[name].mkdir()
        (paths[name] / "config.json").write_text(json.dumps(config(model).config))
    deployment, pool = tmp_path / "deployment.yaml", tmp_path / "pool.yaml"
    deployment.write_text(DEPLOYMENT.format(quantization=quantization, **paths))
    pool.write_text(POOL)
    return deployment, pool


async def test_json_has_the_names_of_status(
    tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment, pool = files(tmp_path)
    assert await run_plan(PlanOptions([deployment], [pool], output="json"), hub) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is True
    bf16, awq = answer["variants"]
    assert (bf16["name"], bf16["accelerator"], bf16["tensorParallel"]) == ("bf16", "A10", 1)
    assert bf16["plan"].keys() >= {"weightsGiB", "kvCacheGiB", "kvCacheTokens", "maxModelLen"}
    assert float(bf16["plan"]["weightsGiB"]) == pytest.approx(14.2, abs=0.1)
    assert awq["accelerator"] == "T4"
    assert awq["dtype"] == "float16"
    assert awq["placedNow"] == 0


async def test_the_exit_code_says_whether_everything_fits(
    tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment, pool = files(tmp_path, quantization="GPTQ")
    assert await run_plan(PlanOptions([deployment], [pool], output="yaml"), hub) == 1
    answer = yaml.safe_load(capsys.readouterr().out)
    refused = answer["variants"][1]
    assert refused["reason"] == "QuantizationMismatch"
    assert "AWQ" in refused["message"]
    assert refused["rejections"][0]["source"]


async def test_invalid_files_exit_with_2(
    tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "x.yaml"
    broken.write_text("kind: Nothing")
    assert await run_plan(PlanOptions([broken]), hub) == 2
    assert "x.yaml" in capsys.readouterr().err


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


async def test_several_documents_come_through_a_pipe(
    tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, pool = files(tmp_path)
    first = deployment.read_text()
    second = first.replace("{name: qwen}", "{name: other}")
    pipe(monkeypatch, f"{first}---\n{second}---\n{pool.read_text()}")
    assert await run_plan(PlanOptions([Path("-")], output="json"), hub) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    # The pool came with them, and has two A10: enough for both, and four T4.
    assert [(v["deployment"], v["name"], v["fits"]) for v in variants] == [
        ("qwen", "bf16", True), ("qwen", "awq", True), ("other", "bf16", True), ("other", "awq", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            DEPLOYMENT.format(bf16="/a", awq="/b", quantization="AWQ") + "---" + DEPLOYMENT.format(
                bf16="/a", awq="/b", quantization="AWK").replace("qwen", "other"),
            "stdin:27: document 2 (ModelDeployment other): spec.variants[1].quantization: 'AWK' is",
        ),
        (POOL, "-: holds no ModelDeployment to plan"),
        ("", "stdin: holds no resource"),
        ("\0", "stdin: not valid YAML"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_standard_input_is_named(
    text: str,
    message: str,
    hub: ModelHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe(monkeypatch, text)
    assert await run_plan(PlanOptions([Path("-")]), hub) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert not captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "-f", "-", "--pool", "-"], "standard input can be read only once"),
        (["plan", "-f", "-", "-f", "-"], "standard input can be read only once"),
        (["plan"], "give either -f FILE or --model SOURCE"),
        (["up", "-f", "-"], "follows its files"),
    ],
)
def test_what_standard_input_can_not_do_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["modelfleet", *arguments])
    pipe(monkeypatch, "")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("columns", ["80", "160"])
async def test_the_table_explains(
    tmp_path: Path,
    hub: ModelHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    deployment, pool = files(tmp_path)
    assert await run_plan(PlanOptions([deployment], [pool], explain=True), hub) == 0
    text = capsys.readouterr().out
    for words in ("bf16", "awq", "A10", "14.2", "W4A16 (Marlin)", "for the KV cache", "28 layers"):
        assert words in text


async def test_a_model_alone_is_compared_everywhere(
    tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path)
    options = PlanOptions([], model=f"file://{tmp_path}/bf16", output="json")
    assert await run_plan(options, hub) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert {v["name"] for v in variants} == {"None", "FP8", "INT8", "AWQ", "GPTQ", "NVFP4"}
    t4 = {v["name"]: v for v in variants if v.get("accelerator") == "T4"}
    assert t4["None"]["tensorParallel"] == 2
    assert t4["FP8"]["tensorParallel"] == 1
    ranks = [v["costRank"] for v in variants if v["fits"]]
    assert min(ranks) == 1
    assert max(ranks) > 3


async def test_what_cannot_be_read_is_one_clear_reason(
    hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run_plan(PlanOptions([], model="file:///nothing/here", output="json"), hub) == 1
    (variant, *_) = json.loads(capsys.readouterr().out)["variants"]
    assert variant["message"].startswith("NotFound:")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("notaurl", "hf://org/name"),
        ("Qwen/Qwen3-8B", "did you mean hf://Qwen/Qwen3-8B?"),
        ("Qwen/Qwen3-8B@main", "did you mean hf://Qwen/Qwen3-8B@main?"),
        ("http://h/x", "is no source"),
    ],
)
async def test_what_is_no_source_is_not_planned(
    source: str, hint: str, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run_plan(PlanOptions([], model=source), hub) == 2
    captured = capsys.readouterr()
    assert hint in captured.err
    assert not captured.out


async def test_a_directory_is_told_from_a_source(
    tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run_plan(PlanOptions([], model=str(tmp_path)), hub) == 2
    assert f"did you mean file://{tmp_path}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "words"),
    [("a-Q4_K_M.gguf", "GGUF"), ("adapter_config.json", "spec.adapters"), ("params.json", "Mistral"),
     ("model_index.json", "diffusion"), ("README.md", "has no config.json")],
)  # fmt: skip
async def test_what_else_a_source_is_is_said(
    file: str, words: str, tmp_path: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text("{}")
    assert await run_plan(PlanOptions([], model=f"file://{tmp_path}"), hub) == 1
    assert words in capsys.readouterr().err


async def test_a_claim_is_not_left(hub: ModelHub, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("pvc://../etc", "pvc://claim/../../etc", "pvc:///etc"):
        assert await run_plan(PlanOptions([], model=source), hub) == 1
        assert "no path inside of a claim" in capsys.readouterr().err
