"""Room for LoRA adapters: the rank that an engine is started for.

An engine keeps slots of one rank and loads no adapter of a higher one. Where the user leaves the rank open,
it is the highest of the adapters that are listed, at least the default, in the steps that engines know. It
does not shrink while an engine runs: an adapter that goes is no reason to restart it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from modelfleet_operator.planner.facts import ModelUnavailable
from modelfleet_serving.contract import Adapter

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's steps; SGLang takes any."""
DEFAULT_RANK: Final = 16
_MARK: Final = "adapter:"


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the planner knows of an adapter.

    Attributes:
        rank: the highest of its matrices.
    """

    rank: int


@dataclass(frozen=True, slots=True)
class RankChoice:
    """The rank that an engine needs.

    Attributes:
        rank: for its command line.
        unread: adapters that nothing is known of yet.
        notes: what the user should know of the others.
    """

    rank: int
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def adapter_key(source: str) -> str:
    """What an adapter's facts are called among those of models: the same source may be read as either."""
    return _MARK + source


def adapter_source(key: str) -> str | None:
    """The source of a key that :func:`adapter_key` made; ``None`` for a model's."""
    return key.removeprefix(_MARK) if key.startswith(_MARK) else None


def choose_rank(
    adapters: list[Adapter],
    facts: Mapping[str, object],
    *,
    asked: int | None = None,
    running: int | None = None,
) -> RankChoice:
    """The rank for these adapters.

    Args:
        adapters: that are listed.
        facts: by :func:`adapter_key`; what is not read yet is missing.
        asked: what the user wrote: it stays.
        running: of the engine that runs.
    """
    rank = asked or max(DEFAULT_RANK, running or 0)
    unread, notes = [], []
    for adapter in adapters:
        found = facts.get(adapter_key(adapter.source))
        if isinstance(found, AdapterFacts):
            if asked is None:
                rank = max(rank, step_of(found.rank))
            elif found.rank > asked:
                notes.append(
                    f"adapter {adapter.name} has rank {found.rank}, above engine.lora.maxRank {asked}: "
                    "engines will not load it"
                )
            if found.rank > RANKS[-1]:
                notes.append(
                    f"adapter {adapter.name} has rank {found.rank}: engines take {RANKS[-1]} at most"
                )
        elif isinstance(found, ModelUnavailable):
            if asked is None:
                notes.append(
                    f"adapter {adapter.name}: its rank can't be read ({found.reason}: {found.message}), so "
                    f"{DEFAULT_RANK} is reckoned with; engine.lora.maxRank sets another"
                )
        else:
            unread.append(adapter.name)
    return RankChoice(rank, tuple(unread), tuple(notes))


def step_of(rank: int) -> int:
    """The smallest step that holds a rank; the highest one for more."""
    return next((step for step in RANKS if step >= rank), RANKS[-1])
