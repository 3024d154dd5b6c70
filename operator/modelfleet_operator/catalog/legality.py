"""What engines can run where: ``legality.yaml`` and the snapshots of engine sources, as lookups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from modelfleet_operator.catalog.engines import version_key

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Step:
    """One way to compute with a scheme.

    Attributes:
        floor: compute capability that it needs; ``None`` for the CPU.
        compute: for people, such as ``W8A16 (Marlin)``.
        note: what the user should know of it.
        source: file of the engine.
    """

    floor: Capability | None
    compute: str
    note: str
    source: str


@dataclass(frozen=True, slots=True)
class LoadTime:
    """A method that an engine applies to unquantized weights while it loads them."""

    method: str
    scheme: str
    since: tuple[int, ...]
    until: tuple[int, ...] | None
    source: str

    def holds(self, version: tuple[int, ...]) -> bool:
        """Whether a version of the engine has it."""
        return self.since <= version and (self.until is None or version[: len(self.until)] <= self.until)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A method that needs a package beside the engine, up to a version or from the next one on."""

    until: tuple[int, ...]
    message: str


@dataclass(frozen=True, slots=True)
class EngineRules:
    """All rules of one engine."""

    floor: Capability
    floor_source: str
    cpu: bool
    cpu_source: str
    mla_floor: Capability
    mla_source: str
    no_float16: frozenset[str]
    no_float16_source: str
    kv_fp8_floor: Capability
    kv_fp8_fallback: Capability
    kv_fp8_source: str
    load_time: Mapping[str, LoadTime]
    plugins: Mapping[str, Plugin]
    schemes: Mapping[str, tuple[Step, ...]]


@dataclass(frozen=True, slots=True)
class Method:
    """The engine's own gate of a checkpoint method, as its source says."""

    min_capability: Capability
    dtypes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was read from an engine's source.

    Attributes:
        engine: name of the engine.
        version: whose source it was.
        methods: checkpoint methods that it loads.
        architectures: what each can do: ``lora``, ``pipeline``, ``multimodal`` (vLLM only).
    """

    engine: str
    version: str
    methods: Mapping[str, Method]
    architectures: Mapping[str, frozenset[str]]


def capability(text: str) -> Capability:
    """``8.6`` as a pair."""
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


@cache
def engine_rules(engine: str) -> EngineRules | None:
    """Rules of an engine; ``None`` for engines without hardware demands."""
    entry = _load().get(engine)
    return _rules(entry) if entry else None


@cache
def _load() -> Mapping[str, Any]:
    text = files(__package__).joinpath("legality.yaml").read_text(encoding="utf-8")
    loaded: Mapping[str, Any] = yaml.safe_load(text)
    return loaded


def _rules(entry: Mapping[str, Any]) -> EngineRules:
    return EngineRules(
        floor=capability(entry["floor"]),
        floor_source=entry["floorSource"],
        cpu=bool(entry["cpu"]),
        cpu_source=entry.get("cpuSource", ""),
        mla_floor=capability(entry["mlaFloor"]),
        mla_source=entry["mlaSource"],
        no_float16=frozenset(entry["noFloat16"]),
        no_float16_source=entry["noFloat16Source"],
        kv_fp8_floor=capability(entry["kvFp8Floor"]),
        kv_fp8_fallback=capability(entry["kvFp8Fallback"]),
        kv_fp8_source=entry["kvFp8Source"],
        load_time={
            name: LoadTime(
                e["method"],
                e["scheme"],
                version_key(e.get("since", "0")),
                version_key(e["until"]) if "until" in e else None,
                e["source"],
            )
            for name, e in entry["loadTime"].items()
        },
        plugins={
            name: Plugin(version_key(e.get("until", "0")), e["message"])
            for name, e in entry["plugins"].items()
        },
        schemes={name: tuple(_step(s) for s in steps) for name, steps in entry["schemes"].items()},
    )


def _step(entry: Mapping[str, Any]) -> Step:
    return Step(
        floor=None if entry.get("cpu") else capability(entry["from"]),
        compute=entry["compute"],
        note=entry.get("note", ""),
        source=entry.get("source", ""),
    )


@cache
def snapshots() -> tuple[Snapshot, ...]:
    """All of them, oldest version first."""
    folder = files(__package__).joinpath("snapshots")
    found = [
        _snapshot(json.loads(f.read_text(encoding="utf-8")))
        for f in folder.iterdir()
        if f.name.endswith(".json")
    ]
    return tuple(sorted(found, key=lambda s: (s.engine, version_key(s.version))))


def _snapshot(data: Mapping[str, Any]) -> Snapshot:
    return Snapshot(
        engine=data["engine"],
        version=data["version"],
        methods={
            name: Method(divmod(m["minCapability"] or 0, 10), frozenset(m["dtypes"]))
            for name, m in data["methods"].items()
        },
        architectures={name: frozenset(words) for name, words in data["architectures"].items()},
    )


@cache
def snapshot(engine: str, version: str) -> Snapshot | None:
    """The newest one that is not newer than the version; the oldest for older versions."""
    known = [s for s in snapshots() if s.engine == engine]
    older = [s for s in known if version_key(s.version) <= version_key(version)]
    return older[-1] if older else (known[0] if known else None)
