"""Whether an engine can run a variant on an accelerator, and how; each verdict names its source.

Keyed by engine and version, checkpoint method and scheme, compute capability, dtype and architecture. The
table is :mod:`modelfleet_operator.catalog.legality`; here is only the order in which its rules are asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelfleet_operator.catalog.accelerators import Accelerator
from modelfleet_operator.catalog.engines import default_version, version_key
from modelfleet_operator.catalog.legality import EngineRules, Snapshot, Step, engine_rules, snapshot
from modelfleet_operator.planner.facts import ModelFacts
from modelfleet_operator.planner.quantization import Declared, resolve
from modelfleet_operator.planner.types import Rejection, Rule, VariantRequest
from modelfleet_operator.planner.weights import WeightScheme

LONGER_CONTEXT_VARIABLES = ("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN")
NOTE_FP8_KV = "FP8 keys and values are read by FlashInfer alone here: it must be in the engine's image"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it runs.

    Attributes:
        scheme: how the weights lie in memory.
        dtype: of activations and unquantized weights.
        kv_cache_dtype: of the KV cache.
        kv_dtype_bytes: bytes of one of its values.
        quantize_at_load: method that the engine applies to an unquantized checkpoint.
        notes: what the user should know.
        splits_layers: whether the engine can spread the layers over pipeline stages.
    """

    scheme: WeightScheme
    dtype: str
    kv_cache_dtype: str
    kv_dtype_bytes: float
    quantize_at_load: str | None = None
    notes: tuple[str, ...] = ()
    splits_layers: bool = True


@dataclass(frozen=True, slots=True)
class _Case:
    """One question, with its parts at hand."""

    request: VariantRequest
    facts: ModelFacts
    accelerator: Accelerator
    rules: EngineRules
    source: Snapshot
    version: str

    def refuse(self, rule: Rule, message: str, source: str) -> Rejection:
        return Rejection(self.accelerator.name, rule, message, source)

    @property
    def engine(self) -> str:
        return f"{self.request.engine.type} {self.version}"


def judge(request: VariantRequest, facts: ModelFacts, accelerator: Accelerator) -> Verdict | Rejection:
    """How the variant runs on the accelerator, or the rule that forbids it."""
    engine = request.engine.type
    rules = engine_rules(engine)
    version = request.engine.version or default_version(engine) or "0"
    source = snapshot(engine, version)
    if rules is None or source is None:
        return Rejection(accelerator.name, Rule.ENGINE_NOT_SUPPORTED, f"{engine} is no known engine")
    case = _Case(request, facts, accelerator, rules, source, version)
    refusal = _engine_on(case) or _context(case) or _architecture(case) or _attention(case)
    if refusal is not None:
        return refusal
    declared = resolve(request, facts, rules, version)
    if isinstance(declared, Rejection):
        return Rejection(accelerator.name, declared.rule, declared.message, declared.source)
    step = _step(case, declared)
    if isinstance(step, Rejection):
        return step
    dtype = _dtype(case, declared)
    if isinstance(dtype, Rejection):
        return dtype
    kv = _kv_cache(case, dtype)
    if isinstance(kv, Rejection):
        return kv
    scheme = declared.weights
    if step is not None:
        scheme = WeightScheme(
            scheme.name, scheme.bytes_per_weight, scheme.experts_only, scheme.quantizes_head,
            scheme.quantizes_vision, step.compute,
        )  # fmt: skip
    said = (step.note if step else "", _dtype_note(case, dtype), kv[2], facts.approximate)
    notes = [note for note in said if note]
    abilities = source.architectures.get(facts.architecture)
    splits_layers = engine != "vLLM" or abilities is None or "pipeline" in abilities
    return Verdict(scheme, dtype, kv[0], kv[1], declared.quantize_at_load, tuple(notes), splits_layers)


def _engine_on(case: _Case) -> Rejection | None:
    accelerator, rules = case.accelerator, case.rules
    if accelerator.is_cpu:
        if rules.cpu:
            return None
        return case.refuse(Rule.ENGINE_NOT_SUPPORTED, f"{case.engine} does not run on CPUs", rules.cpu_source)
    if accelerator.compute_capability is None:
        text = f"{case.engine} is not known to run on {accelerator.name} ({accelerator.vendor})"
        return case.refuse(Rule.ENGINE_NOT_SUPPORTED, text, "catalogue")
    if accelerator.compute_capability < rules.floor:
        return case.refuse(
            Rule.COMPUTE_CAPABILITY,
            f"{case.engine} needs compute capability {_name(rules.floor)}, "
            f"{accelerator.name} has {accelerator.capability_name}",
            rules.floor_source,
        )
    return None


def _context(case: _Case) -> Rejection | None:
    """Engines refuse a context beyond the model's own, unless they are told to stretch it."""
    asked, limit = case.request.engine.max_model_len, case.facts.max_context
    engine = case.request.engine
    stretched = any(
        name in engine.args for name in ("hf-overrides", "hf_overrides", "json-model-override-args")
    )
    allowed = any(engine.env.get(name) in {"1", "true", "True"} for name in LONGER_CONTEXT_VARIABLES)
    if asked is None or asked <= limit or stretched or allowed:
        return None
    return case.refuse(
        Rule.CONTEXT_TOO_LONG,
        f"maxModelLen {asked:,} is beyond the {limit:,} tokens that the model was made for",
        "config.json; vllm/config/model.py _get_and_verify_max_len",
    )


def _architecture(case: _Case) -> Rejection | None:
    abilities = case.source.architectures.get(case.facts.architecture)
    if abilities is None or case.request.engine.type != "vLLM":
        return None  # unknown ones may be served through Transformers; SGLang's source names no abilities
    if (case.request.adapters or case.request.engine.lora) and "lora" not in abilities:
        return case.refuse(
            Rule.ADAPTERS_NOT_SUPPORTED,
            f"{case.engine} serves {case.facts.architecture} without LoRA adapters",
            f"vllm/model_executor/models: {case.facts.architecture} is no SupportsLoRA",
        )
    if case.request.engine.pipeline_parallel_size > 1 and "pipeline" not in abilities:
        return case.refuse(
            Rule.ARCHITECTURE_NOT_SUPPORTED,
            f"{case.engine} can't split {case.facts.architecture} into pipeline stages",
            f"vllm/model_executor/models: {case.facts.architecture} is no SupportsPP",
        )
    return None


def _attention(case: _Case) -> Rejection | None:
    found = case.accelerator.compute_capability
    if found is None or not case.facts.uses_mla or found >= case.rules.mla_floor:
        return None
    return case.refuse(
        Rule.ATTENTION_NOT_SUPPORTED,
        f"multi-head latent attention needs compute capability {_name(case.rules.mla_floor)}, "
        f"{case.accelerator.name} has {case.accelerator.capability_name}",
        case.rules.mla_source,
    )


def _step(case: _Case, declared: Declared) -> Step | Rejection | None:
    """How the scheme is computed with here; ``None`` for unquantized weights."""
    if declared.weights.name == "none":
        return None
    gate = _gate(case, declared)
    if gate is not None:
        return gate
    steps = case.rules.schemes.get(declared.weights.name, ())
    found = case.accelerator.compute_capability
    for step in steps:
        reaches = step.floor is None if found is None else step.floor is not None and found >= step.floor
        if reaches:
            return step
    what = f"{declared.label} ({declared.weights.name})"
    floors = [step.floor for step in steps if step.floor is not None]
    if found is None or not floors:
        text = f"{case.engine} has no kernels for {what} on {case.accelerator.name}"
        return case.refuse(Rule.QUANTIZATION_NOT_SUPPORTED, text, "legality table")
    last = min(zip(floors, (s.source for s in steps if s.floor is not None), strict=True))
    return case.refuse(
        Rule.COMPUTE_CAPABILITY,
        f"{what} needs compute capability {_name(last[0])}, "
        f"{case.accelerator.name} has {case.accelerator.capability_name}",
        last[1],
    )


def _gate(case: _Case, declared: Declared) -> Rejection | None:
    """The engine's own check of the checkpoint's method."""
    plugin = case.rules.plugins.get(declared.method)
    if (
        plugin is not None
        and version_key(case.version) > plugin.until
        and declared.method not in case.source.methods
    ):
        return case.refuse(Rule.QUANTIZATION_NOT_SUPPORTED, plugin.message, f"{case.engine}: no such method")
    method = case.source.methods.get(declared.method)
    if method is None:
        if declared.quantize_at_load is not None:
            return None
        text = f"{case.engine} knows no quantization method {declared.method}"
        return case.refuse(Rule.QUANTIZATION_NOT_SUPPORTED, text, f"source of {case.source.version}")
    found = case.accelerator.compute_capability
    if found is not None and found < method.min_capability:
        return case.refuse(
            Rule.COMPUTE_CAPABILITY,
            f"{declared.label} needs compute capability {_name(method.min_capability)}, "
            f"{case.accelerator.name} has {case.accelerator.capability_name}",
            f"{case.request.engine.type} {case.source.version}: get_min_capability of {declared.method}",
        )
    return None


def _dtype(case: _Case, declared: Declared) -> str | Rejection:
    """The activation dtype: the user's, or the model's where the accelerator has it."""
    asked = case.request.engine.dtype
    wanted = asked or ("bfloat16" if case.facts.dtype == "float32" else case.facts.dtype)
    native = case.accelerator.dtypes
    allowed = case.source.methods.get(declared.method) if declared.weights.name != "none" else None
    if asked is not None and asked not in native:
        return case.refuse(
            Rule.DTYPE_NOT_SUPPORTED,
            f"{case.accelerator.name} ({case.accelerator.capability_name}) has no {asked}: "
            "leave engine.dtype out or set Float16",
            "vllm/platforms/cuda.py check_if_supports_dtype: bfloat16 needs compute capability 8.0",
        )
    choice = wanted if wanted in native else "float16"
    if allowed is not None and choice not in allowed.dtypes:
        others = sorted((allowed.dtypes & native) - {"float32", "float8_e4m3fn"})
        if asked is not None or not others:
            return case.refuse(
                Rule.DTYPE_NOT_SUPPORTED,
                f"{declared.label} runs in {' or '.join(sorted(allowed.dtypes))} only",
                f"{case.engine}: get_supported_act_dtypes of {declared.method}",
            )
        choice = others[0]
    if choice == "float16" and case.facts.model_type in case.rules.no_float16:
        return case.refuse(
            Rule.DTYPE_NOT_SUPPORTED,
            f"{case.accelerator.name} has no bfloat16, and {case.facts.model_type} can't run in float16",
            case.rules.no_float16_source,
        )
    return choice


def _dtype_note(case: _Case, dtype: str) -> str:
    if case.facts.dtype in {dtype, "float32"} or case.request.engine.dtype:
        return ""
    if case.facts.dtype not in case.accelerator.dtypes:
        return f"{case.accelerator.name} has no {case.facts.dtype}: runs in {dtype}"
    return f"the quantization method has no {case.facts.dtype}: runs in {dtype}"


def _kv_cache(case: _Case, dtype: str) -> tuple[str, float, str] | Rejection:
    """Dtype of the KV cache, bytes of a value, and a note."""
    asked = case.request.engine.kv_cache_dtype or "auto"
    if asked == "auto":
        return dtype, 4.0 if dtype == "float32" else 2.0, ""
    found = case.accelerator.compute_capability
    if found is None:
        text = "the CPU backend keeps keys and values in 16 bits only"
        return case.refuse(Rule.KV_CACHE_DTYPE_NOT_SUPPORTED, text, "vllm/v1/attention/backends/cpu_attn.py")
    if found >= case.rules.kv_fp8_floor:
        return asked, 1.0, ""
    if found >= case.rules.kv_fp8_fallback and not case.facts.uses_mla:
        return asked, 1.0, NOTE_FP8_KV
    return case.refuse(
        Rule.KV_CACHE_DTYPE_NOT_SUPPORTED,
        f"a KV cache in {asked} needs compute capability {_name(case.rules.kv_fp8_floor)}, "
        f"{case.accelerator.name} has {case.accelerator.capability_name}",
        case.rules.kv_fp8_source,
    )


def _name(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
