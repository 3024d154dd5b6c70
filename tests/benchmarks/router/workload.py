"""Request files for the load generator: bodies as clients send them, `messages` before `model`."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.router.contestants import MODEL

BYTES_PER_TOKEN = 4
"""As the mock engine counts."""
_TEXT = """
    model token engine cache prefix batch memory page block layer weight stream router replica queue latency
    attention value key query context window sample answer question the of and to in is for with that on as by
"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Request:
    """One request of a trace. ``at`` is seconds from the start, or after the session's turn before."""

    body: bytes
    at: float = 0.0
    session: int = 0
    turn: int = 0


def text(rng: random.Random, tokens: int) -> str:
    """Words worth ``tokens`` tokens, different for each call."""
    size = tokens * BYTES_PER_TOKEN
    words: list[str] = []
    length = 0
    while length < size:
        word = rng.choice(WORDS)
        words.append(word)
        length += len(word) + 1
    return " ".join(words)[:size]


def chat(messages: list[dict[str, str]], *, max_tokens: int, stream: bool) -> bytes:
    """A chat completion in the order in which the openai package serializes it."""
    body = {"messages": messages, "model": MODEL, "max_tokens": max_tokens, "stream": stream}
    return json.dumps(body).encode()


def message(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def mark(length: int) -> str:
    """Where the generator writes a request's id; ``length`` is the number of chunks of the answer."""
    return f"@i={'0' * 16}k={length:06d}@"


def write(path: Path, requests: Iterable[Request]) -> Path:
    """Write the generator's format (see ``loadgen.c``)."""
    with path.open("wb") as file:
        for request in requests:
            body = request.body
            head = struct.pack("<QIIQQ", int(request.at * 1e6), request.session, request.turn, len(body), 0)
            file.write(head + body + b"\0" * (-len(body) % 8))
    return path


def bodies(path: Path, size: int) -> Path:
    """16 prompts of ``size`` bytes: a quarter is one of 4 system prompts, then comes the user's own text."""
    rng = random.Random(size)
    overhead = len(chat([message("system", ""), message("user", "")], max_tokens=32, stream=False))
    tokens = (size - overhead) // BYTES_PER_TOKEN
    systems = [text(rng, tokens // 4) for _ in range(4)]
    requests = []
    for index in range(16):
        user = text(rng, tokens - tokens // 4)
        messages = [message("system", systems[index % 4]), message("user", user)]
        requests.append(Request(chat(messages, max_tokens=32, stream=False)))
    return write(path, requests)


def streams(path: Path, *, tokens: int) -> Path:
    """Small prompts with streamed answers of ``tokens`` chunks."""
    rng = random.Random(tokens)
    return write(
        path,
        [
            Request(chat([message("user", mark(tokens) + text(rng, 60))], max_tokens=tokens, stream=True))
            for _ in range(64)
        ],
    )


def arrivals(rng: random.Random, stages: Iterable[tuple[float, float]]) -> list[float]:
    """Poisson arrivals over stages of (requests a second, seconds)."""
    times: list[float] = []
    begin = 0.0
    for rate, seconds in stages:
        at = begin
        while (at := at + rng.expovariate(rate)) < begin + seconds:
            times.append(at)
        begin += seconds
    return times


@dataclass(frozen=True)
class Trace:
    """A trace file and what it holds."""

    path: Path
    requests: int
    seconds: float
    best_hit_rate: float
    """Share of prompt bytes that an unlimited cache shared by all replicas would hold."""


def _trace(path: Path, requests: list[Request], seconds: float, shared: float) -> Trace:
    write(path, requests)
    return Trace(path, len(requests), seconds, shared)


def shared_prefix(
    path: Path, *, stage_seconds: float, groups: int = 150, users: int = 5, seed: int = 7
) -> Trace:
    """System prompts of 6,000 tokens, each with ``users`` prompts of 1,200 own ones; 3 to 60 a second."""
    rng = random.Random(seed)
    systems = [text(rng, 6000) for _ in range(groups)]
    questions = {(g, u): text(rng, 1200) for g in range(groups) for u in range(users)}
    stages = [(rate, stage_seconds) for rate in (3, 10, 20, 40, 60)]
    requests, seen_groups, seen_prompts, held = [], set(), set(), 0
    for at in arrivals(rng, stages):
        group, user = rng.randrange(groups), rng.randrange(users)
        held += 7200 if (group, user) in seen_prompts else 6000 if group in seen_groups else 0
        seen_groups.add(group)
        seen_prompts.add((group, user))
        messages = [message("system", systems[group]), message("user", questions[group, user])]
        requests.append(Request(chat(messages, max_tokens=32, stream=True), at, session=len(requests)))
    return _trace(path, requests, stage_seconds * len(stages), held / (7200 * len(requests)))


def multi_turn(path: Path, *, sessions: int, seconds: float, turns: int = 6, seed: int = 11) -> Trace:
    """Conversations of ``turns`` turns, 1,000 tokens more with each; 5 system prompts of 500 tokens."""
    rng = random.Random(seed)
    systems = [text(rng, 500) for _ in range(5)]
    requests, held, total = [], 0, 0
    for session, at in enumerate(sorted(rng.uniform(0, seconds) for _ in range(sessions))):
        messages = [message("system", systems[session % 5])]
        for turn in range(turns):
            messages.append(message("user", text(rng, 800)))
            prompt = 500 + 1000 * turn + 800
            held += prompt - 800 - (0 if turn == 0 else 200)
            total += prompt
            when = at if turn == 0 else rng.uniform(0.5, 1.5)
            requests.append(Request(chat(messages, max_tokens=32, stream=True), when, session, turn))
            messages.append(message("assistant", text(rng, 200)))
    return _trace(path, requests, seconds + turns * 3.0, held / total)


def unshared(path: Path, *, rate: float, seconds: float, tokens: int = 4000, seed: int = 13) -> Trace:
    """Every prompt is new: affinity has nothing to win and may lose nothing."""
    rng = random.Random(seed)
    requests = [
        Request(chat([message("user", text(rng, tokens))], max_tokens=32, stream=True), at, session=index)
        for index, at in enumerate(arrivals(rng, [(rate, seconds)]))
    ]
    return _trace(path, requests, seconds, 0.0)
