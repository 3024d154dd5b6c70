"""Facts from checkpoints: local ones, a hub, an object store; and everything that goes wrong."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.unit.object_store import ObjectStore
from tests.unit.planner.measured import config

from modelfleet_operator.clients.checkpoint_files import CheckpointError, HubFiles, hub_problem
from modelfleet_operator.clients.model_hub import ModelHub, with_class_defaults
from modelfleet_operator.planner import AdapterFacts, ModelFacts, ModelUnavailable
from modelfleet_operator.planner.adapters import adapter_key

ADAPTER_FILES = ("adapter_config.json",)
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}


def safetensors(tensors: dict[str, tuple[str, int]]) -> bytes:
    """A file's header, and no data: nothing may read it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header


def checkpoint(directory: Path, shards: dict[str, bytes] | None = None, **fields: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY | fields))
    for name, data in (shards or {}).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> ModelHub:
    return ModelHub(
        cache_directory=tmp_path / "cache", claims_directory=tmp_path / "claims", timeout_seconds=5
    )


def facts(found: ModelFacts | ModelUnavailable) -> ModelFacts:
    assert isinstance(found, ModelFacts), found
    return found


def unavailable(found: ModelFacts | AdapterFacts | ModelUnavailable) -> ModelUnavailable:
    assert isinstance(found, ModelUnavailable), found
    assert found.message
    assert "\n" not in found.message
    return found


def test_a_directory_with_one_file(hub: ModelHub, tmp_path: Path) -> None:
    directory = checkpoint(
        tmp_path / "m", {"model.safetensors": safetensors({"a": ("BF16", 400), "b": ("F32", 80)})}
    )
    found = facts(hub.read(f"file://{directory}"))
    assert dict(found.tensor_bytes) == {"BF16": 400, "F32": 80}
    assert found.layers == 2


def test_an_index_names_the_shards_and_draft_layers_are_left_out(hub: ModelHub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    directory = checkpoint(
        tmp_path / "m",
        {
            "model-1.safetensors": safetensors({"a": ("BF16", 100)}),
            "model-2.safetensors": safetensors({"b": ("BF16", 50), "model.mtp.x": ("BF16", 999)}),
            "consolidated.safetensors": safetensors({"twice": ("BF16", 7777)}),
            "model.safetensors.index.json": json.dumps(index).encode(),
        },
    )
    assert dict(facts(hub.read(f"file://{directory}")).tensor_bytes) == {"BF16": 150}


def test_a_config_alone_is_enough(hub: ModelHub, tmp_path: Path) -> None:
    found = facts(hub.read(f"file://{checkpoint(tmp_path / 'm')}"))
    assert not found.tensor_bytes
    assert found.parameters.total > 0


def test_a_mounted_claim_and_one_that_is_not(hub: ModelHub, tmp_path: Path) -> None:
    checkpoint(tmp_path / "claims" / "models" / "tiny")
    facts(hub.read("pvc://models/tiny"))
    missing = unavailable(hub.read("pvc://other/tiny"))
    assert (missing.reason, missing.unseen, missing.retryable) == ("SourceNotMounted", True, True)


def set_environment(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_object_store(hub: ModelHub, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    header = safetensors({"a": ("BF16", 64)})
    files = {
        "llm/m/config.json": json.dumps(TINY).encode(),
        "llm/m/model.safetensors": header + bytes(100_000),
        "llm/m/onnx/model.safetensors": safetensors({"b": ("BF16", 32)}),
        "llm/m2/config.json": b"another model's",
    }
    with ObjectStore(files) as store:
        set_environment(monkeypatch, store.environment())
        assert dict(facts(hub.read(f"{scheme}://bucket/llm/m/")).tensor_bytes) == {"BF16": 64}
        assert store.bytes_sent < 2000, "no weights"
        assert unavailable(hub.read(f"{scheme}://bucket/none")).reason == "NotFound"
        assert unavailable(hub.read(f"{scheme}://other/m")).reason == "NotFound"


def test_an_object_store_that_refuses_and_one_that_is_away(
    hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectStore({"m/config.json": json.dumps(TINY).encode()}) as store:
        set_environment(monkeypatch, store.environment(key="revoked"))
        refused = unavailable(hub.read("s3://bucket/m"))
        assert (refused.reason, refused.retryable) == ("Unauthorized", False)
        set_environment(monkeypatch, store.environment())
    away = unavailable(hub.read("s3://bucket/m"))
    assert (away.reason, away.retryable) == ("Unreachable", True)


@pytest.mark.parametrize(
    ("files", "reason", "words"),
    [
        ({"config.json": b"{"}, "BrokenConfig", "not JSON"),
        ({"config.json": b"[]"}, "BrokenConfig", "not an object"),
        ({"config.json": b"{}"}, "BrokenConfig", "architectures"),
        ({"model.safetensors": b"abc"}, "BrokenConfig", "too short"),
        ({"model.safetensors": struct.pack("<Q", 2**40)}, "BrokenConfig", "no safetensors"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"{{"}, "BrokenConfig", "broken safetensors"),
        ({"model.safetensors.index.json": b"{}"}, "BrokenConfig", "weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}, "NotFound", "gone"),
    ],
)
def test_broken_checkpoints(
    hub: ModelHub, tmp_path: Path, files: dict[str, bytes], reason: str, words: str
) -> None:
    directory = checkpoint(tmp_path / "m")
    for name, data in files.items():
        (directory / name).write_bytes(data)
    found = unavailable(hub.read(f"file://{directory}"))
    assert found.reason == reason
    assert words in found.message


def test_nothing_there(hub: ModelHub, tmp_path: Path) -> None:
    assert unavailable(hub.read(f"file://{tmp_path}/none")).reason == "NotFound"
    (tmp_path / "empty").mkdir()
    assert "config.json" in unavailable(hub.read(f"file://{tmp_path}/empty")).message
    assert unavailable(hub.read("oci://registry/model")).unseen
    assert unavailable(hub.read("hf://only-a-name")).reason == "NotFound"


class _Hub(BaseHTTPRequestHandler):
    """A hub with one model, one gated model, and a bad day."""

    requests: list[str]
    files = {
        "config.json": json.dumps(TINY).encode(),
        "model.safetensors": safetensors({"a": ("BF16", 256)}) + b"weights that nobody may load" * 1000,
    }

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        if "/gated/" in self.path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/down/" in self.path:
            self._answer(503, b"{}")
        elif "/org/tiny" in self.path and self.path.startswith("/api/"):
            names = [{"rfilename": name} for name in self.files]
            self._answer(200, json.dumps({"id": "org/tiny", "sha": "c0ffee", "siblings": names}).encode())
        elif self.path.startswith("/org/tiny/resolve/c0ffee/"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            data = self.files[self.path.rsplit("/", 1)[-1]][int(first) : int(last) + 1]
            self.server.bytes_sent += len(data)  # type: ignore[attr-defined]
            self._answer(206, data)
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.requests, server.bytes_sent = [], 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.ENDPOINT", url, raising=False)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_the_hub_is_asked_for_headers_only_and_once_for_a_revision(hub: ModelHub, server: Any) -> None:
    found = facts(hub.read("hf://org/tiny@main"))
    assert dict(found.tensor_bytes) == {"BF16": 256}
    assert found.revision == "c0ffee"
    assert server.bytes_sent < 2000, "no weights"
    resolved = sum("/resolve/" in path for path in server.requests)
    assert facts(hub.read("hf://org/tiny@main")) == found
    assert sum("/resolve/" in path for path in server.requests) == resolved, "kept by its revision"


@pytest.mark.parametrize(
    ("source", "reason", "retryable"),
    [
        ("hf://gated/model", "Gated", False),
        ("hf://org/none", "NotFound", False),
        ("hf://down/model", "Unreachable", True),
    ],
)
def test_what_the_hub_refuses(hub: ModelHub, server: Any, source: str, reason: str, retryable: bool) -> None:
    found = unavailable(hub.read(source))
    assert (found.reason, found.retryable) == (reason, retryable)


async def test_a_hub_that_does_not_answer(hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(ModelHub, "read", lambda self, source: release.wait(20))
    hub.timeout_seconds = 0.05
    found = unavailable(await hub.facts("hf://org/slow"))
    release.set()
    assert (found.reason, found.retryable) == ("Unreachable", True)


ADAPTER = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "rank_pattern": {}}


def adapter(directory: Path, **fields: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER | fields))
    return directory


class TestAdapters:
    async def test_a_directory_and_a_mounted_claim(self, hub: ModelHub, tmp_path: Path) -> None:
        directory = adapter(tmp_path / "claims" / "loras" / "x")
        for source in (f"file://{directory}", "pvc://loras/x"):
            assert await hub.facts(adapter_key(source)) == AdapterFacts(32)
        missing = unavailable(await hub.facts(adapter_key("pvc://other/x")))
        assert (missing.reason, "its adapter_config.json" in missing.message) == ("SourceNotMounted", True)

    def test_a_module_of_a_higher_rank_counts(self, hub: ModelHub, tmp_path: Path) -> None:
        directory = adapter(tmp_path / "a", rank_pattern={"q_proj": 128, "v_proj": 8})
        assert hub.read_adapter(f"file://{directory}") == AdapterFacts(128)

    def test_an_object_store(self, hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {"loras/x/adapter_config.json": json.dumps(ADAPTER).encode(), "loras/x/w": bytes(100_000)}
        with ObjectStore(files) as store:
            set_environment(monkeypatch, store.environment())
            assert hub.read_adapter("s3://bucket/loras/x") == AdapterFacts(32)
            assert store.bytes_sent < 2000, "no weights"

    def test_the_hub_and_its_cache(
        self, hub: ModelHub, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = json.dumps(ADAPTER).encode()
        monkeypatch.setattr(
            _Hub, "files", {"adapter_config.json": data, "adapter_model.safetensors": b"x" * 9}
        )
        assert hub.read_adapter("hf://org/tiny") == AdapterFacts(32)
        cached = adapter(tmp_path / "snapshots" / "abc", r=8)
        monkeypatch.setattr(
            "huggingface_hub.try_to_load_from_cache",
            lambda repository, name, revision: str(cached / name) if name in ADAPTER_FILES else None,
        )
        assert hub.read_adapter("hf://down/model") == AdapterFacts(8), "what is here needs no hub"

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ("{", "adapter_config.json is not JSON"),
            ('{"peft_type": "IA3"}', "has no LoRA rank: None"),
            ('{"r": "16"}', "has no LoRA rank: 16"),
            ('{"r": true}', "has no LoRA rank"),
            ('{"r": 0}', "has no LoRA rank: 0"),
            ('{"r": 8, "rank_pattern": {"q": -1}}', "has no LoRA rank: -1"),
            ('{"r": 8, "rank_pattern": 3.5}', "has no LoRA rank: 3.5"),
        ],
    )
    def test_what_names_no_rank(self, hub: ModelHub, tmp_path: Path, config: str, words: str) -> None:
        (tmp_path / "adapter_config.json").write_text(config)
        found = unavailable(hub.read_adapter(f"file://{tmp_path}"))
        assert found.reason == "BrokenConfig"
        assert words in found.message

    def test_a_whole_model_is_no_adapter(self, hub: ModelHub, tmp_path: Path) -> None:
        found = unavailable(hub.read_adapter(f"file://{checkpoint(tmp_path / 'm')}"))
        assert "has no adapter_config.json" in found.message


def test_other_errors_become_one_reason() -> None:
    problem = hub_problem("hf://a/b", ConnectionError("no route"))
    assert isinstance(problem, CheckpointError)
    assert (problem.reason, problem.retryable) == ("Unreachable", True)


def test_the_token_is_in_no_message(hub: ModelHub) -> None:
    hub.token = "hf_secret"
    assert "hf_secret" not in repr(hub)
    assert HubFiles("a/b", None, "hf_secret", 1).describe() == "hf://a/b"


def test_defaults_of_the_class_fill_what_the_checkpoint_leaves_out() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    filled = with_class_defaults({"architectures": ["X"], "model_type": "gemma3", "text_config": text})
    assert filled["text_config"]["vocab_size"] == 262208
    assert filled["text_config"]["hidden_size"] == 2560
    unknown = {"model_type": "never-heard-of", "hidden_size": 1}
    assert with_class_defaults(unknown) == unknown


@pytest.mark.parametrize(
    "model",
    [
        "deepseek-ai/deepseek-vl2-small",
        "google/gemma-3-27b-it",
        "openai/gpt-oss-20b",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "OpenGVLab/InternVL3-8B",
        "openai/whisper-large-v3",
        "deepseek-ai/DeepSeek-V3",
        "BAAI/bge-large-en-v1.5",
    ],
)
def test_defaults_change_no_fact_of_a_complete_config(hub: ModelHub, tmp_path: Path, model: str) -> None:
    known = config(model)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(known.config))
    found = facts(hub.read(f"file://{tmp_path}/m"))
    for name in ("parameters", "attention", "max_context", "dtype", "vision", "quantization", "rope_values"):
        assert getattr(found, name) == getattr(known.facts, name), name
