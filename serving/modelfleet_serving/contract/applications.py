"""Applications: what the operator asks Ray Serve to run."""

from __future__ import annotations

from typing import Any

from modelfleet_serving.contract.base import Task, Wire


class LoraSettings(Wire, kw_only=True, frozen=True):
    """LoRA as the engine is started with it."""

    max_loras: int = 1
    """Adapters in one batch."""
    max_rank: int = 16
    max_cpu_loras: int | None = None


class EngineSettings(Wire, kw_only=True, frozen=True):
    """One engine's start, in the field's common terms. ``None`` leaves the engine's own default."""

    type: str
    """A name in the engine registry: ``vLLM``, ``SGLang``, ``Simulator``."""
    version: str | None = None
    max_model_len: int | None = None
    """Context length in tokens."""
    gpu_memory_percent: int | None = None
    """Share of each GPU's memory that the engine may take, 1..100."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache per rank, in bytes; takes the place of the share where the engine allows it."""
    max_num_seqs: int | None = None
    chunked_prefill: bool | None = None
    max_num_batched_tokens: int | None = None
    """Tokens in one step: the batch size of chunked prefill."""
    prefix_caching: bool | None = None
    dtype: str | None = None
    """``bfloat16``, ``float16`` or ``float32``."""
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    """A method for the engine to apply at load; ``None`` reads it from the checkpoint."""
    load_format: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    lora: LoraSettings | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    multimodal_limits: dict[str, int] = {}
    """Items a prompt may hold, by modality: ``{"image": 2}``."""
    trust_remote_code: bool = False
    args: dict[str, Any] = {}
    """Further command-line options, without their dashes; ``True`` renders a bare flag, ``False`` its
    ``--no-`` form, a list repeats the values, an object is passed as JSON."""
    env: dict[str, str] = {}


class Adapter(Wire, kw_only=True, frozen=True):
    """A LoRA adapter served beside its base model, under a model name of its own."""

    name: str
    source: str


class ReplicaResources(Wire, kw_only=True, frozen=True):
    """What Ray reserves for one replica."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    accelerator_type: str | None = None
    """Ray's own accelerator type, such as ``A10G``."""
    resources: dict[str, float] = {}
    """Custom Ray resources, such as ``{"accelerator:A10": 0.001}``."""


class ApplicationArgs(Wire, kw_only=True, frozen=True):
    """The ``args`` of one Ray Serve application: one (model, variant, revision)."""

    namespace: str
    deployment: str
    """``metadata.name`` of the ModelDeployment."""
    model: str
    """The OpenAI model id, also the engine's served model name."""
    variant: str
    revision: str
    source: str
    """Where the weights are: ``hf://``, ``pvc://``, ``s3://``, ``gs://``, ``oci://``, ``file://``."""
    registry: str
    """Base URL of the registry."""
    engine: EngineSettings
    task: Task = Task.GENERATE
    accelerator: str = "CPU"
    resources: ReplicaResources = ReplicaResources()
    start_timeout_seconds: float = 1800.0
    """Longest time from an engine's start to its readiness."""
    drain_timeout_seconds: float = 600.0
    """Longest time that running requests are given when the replica stops."""

    @property
    def application(self) -> str:
        """Name of the Ray Serve application."""
        return application_name(self.namespace, self.deployment, self.variant, self.revision)


class ReplicaConfig(Wire, kw_only=True, frozen=True):
    """The ``user_config`` of an application's deployment: what changes in replicas that go on running."""

    adapters: list[Adapter] = []
    """The engine takes adapters where ``engine.lora`` is set."""


def application_name(namespace: str, deployment: str, variant: str, revision: str) -> str:
    """Name of the Ray Serve application of one (model, variant, revision)."""
    return f"{namespace}.{deployment}.{variant}.{revision}"


class ApplicationId(Wire, kw_only=True, frozen=True):
    """The parts of an application's name."""

    namespace: str
    deployment: str
    variant: str
    revision: str


def parse_application_name(name: str) -> ApplicationId | None:
    """The parts of an application's name, or ``None`` for one that is not ours.

    A resource's name may hold dots; namespaces, variants and revisions can't.
    """
    namespace, _, rest = name.partition(".")
    parts = rest.rsplit(".", 2)
    if not namespace or len(parts) != 3 or not all(parts):
        return None
    return ApplicationId(namespace=namespace, deployment=parts[0], variant=parts[1], revision=parts[2])
