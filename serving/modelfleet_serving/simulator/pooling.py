"""Embeddings, scores and classes: requests that end with their prompt."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from modelfleet_serving.simulator.engine import Engine
from modelfleet_serving.simulator.faults import Fate
from modelfleet_serving.simulator.generate import error
from modelfleet_serving.simulator.http import Exchange
from modelfleet_serving.simulator.requests import (
    BadRequestError,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    prompts,
)
from modelfleet_serving.simulator.scheduler import Sequence
from modelfleet_serving.simulator.tokens import END, encode

LABELS: Final = ("NEGATIVE", "POSITIVE")


class PoolingJob:
    """Prompts that all have to be processed before the answer."""

    def __init__(
        self,
        engine: Engine,
        exchange: Exchange,
        fate: Fate,
        prompts: Iterable[list[int]],
        adapter: str,
        answer: Callable[[dict[str, int]], dict[str, Any]],
    ) -> None:
        self._engine = engine
        self._exchange = exchange
        self._fate = fate
        self._answer = answer
        self._sequences = [
            Sequence(tokens or [END], 0, adapter=adapter, owner=self, stall_after=fate.stall_after)
            for tokens in prompts
        ]
        self._open = len(self._sequences)
        longest = max(sequence.prompt_length for sequence in self._sequences)
        if longest > engine.config.max_model_len:
            raise BadRequestError(
                f"This model's maximum context length is {engine.config.max_model_len} tokens. "
                f"However, your input has {longest}.",
                "input",
            )

    def start(self) -> None:
        """Queues the prompts."""
        if self._exchange.closed:
            return
        self._exchange.on_close = self.cancel
        for number, sequence in enumerate(self._sequences):
            if not self._engine.submit(sequence):
                self._sequences = self._sequences[:number]
                self.cancel()
                body = error("the queue is full", "ServiceUnavailableError", 503)
                self._exchange.send(503, body, headers="retry-after: 1\r\n")
                return

    def cancel(self) -> None:
        """Ends what still runs."""
        for sequence in self._sequences:
            self._engine.abort(sequence)

    def token(self, sequence: Sequence, token: int) -> None:
        """Never: nothing is generated."""

    def pooled(self, sequence: Sequence) -> None:  # noqa: ARG002 - any of them
        """A prompt is done."""
        self._open -= 1
        if self._fate.reset_after is not None:
            self._exchange.reset()
        elif not self._open:
            total = sum(one.prompt_length for one in self._sequences)
            self._exchange.send(200, self._answer({"prompt_tokens": total, "total_tokens": total}))


def vector(tokens: Iterable[int], size: int, salt: str) -> list[float]:
    """A unit vector that the tokens decide; texts that share tokens are closer than texts that don't."""
    values = [0.0] * size
    for token in tokens:
        digest = hashlib.blake2b(token.to_bytes(8, "big"), digest_size=16, salt=salt.encode()[:16]).digest()
        for position, weight in struct.iter_unpack("<Hh", digest):
            values[position % size] += weight / 32768
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]


def similarity(left: list[int], right: list[int]) -> float:
    """Share of common tokens (Jaccard), 0..1."""
    one, other = set(left), set(right)
    return len(one & other) / (len(one | other) or 1)


def embeddings(
    engine: Engine, exchange: Exchange, fate: Fate, request: EmbeddingRequest, adapter: str
) -> PoolingJob:
    """``/v1/embeddings``."""
    inputs = prompts(request.input, "input")
    size = request.dimensions or engine.config.embedding_size
    if size > engine.config.embedding_size:
        raise BadRequestError(f"dimensions must be at most {engine.config.embedding_size}", "dimensions")
    if request.encoding_format not in {"float", "base64"}:
        raise BadRequestError("encoding_format must be float or base64", "encoding_format")

    def encoded(values: list[float]) -> Any:
        if request.encoding_format == "float":
            return values
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

    def answer(usage: dict[str, int]) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": encoded(vector(tokens, size, adapter))}
            for index, tokens in enumerate(inputs)
        ]
        return {**_head("embd", engine, request.model), "data": data, "usage": usage}

    return PoolingJob(engine, exchange, fate, inputs, adapter, answer)


def classify(
    engine: Engine, exchange: Exchange, fate: Fate, request: EmbeddingRequest, adapter: str
) -> PoolingJob:
    """``/classify``."""
    inputs = prompts(request.input, "input")

    def one(index: int, tokens: list[int]) -> dict[str, Any]:
        positive = (vector(tokens, 8, adapter)[0] + 1) / 2
        return {
            "index": index,
            "label": LABELS[positive >= 0.5],
            "probs": [1 - positive, positive],
            "num_classes": len(LABELS),
        }

    def answer(usage: dict[str, int]) -> dict[str, Any]:
        data = [one(index, tokens) for index, tokens in enumerate(inputs)]
        return {**_head("classify", engine, request.model), "data": data, "usage": usage}

    return PoolingJob(engine, exchange, fate, inputs, adapter, answer)


def rerank(
    engine: Engine, exchange: Exchange, fate: Fate, request: RerankRequest, adapter: str
) -> PoolingJob:
    """``/v1/rerank``."""
    if not request.documents:
        raise BadRequestError("documents must not be empty", "documents")
    query = encode(request.query)
    pairs = [(query, encode(document)) for document in request.documents]

    def answer(usage: dict[str, int]) -> dict[str, Any]:
        results = [
            {
                "index": index,
                "document": {"text": request.documents[index]},
                "relevance_score": similarity(*pair),
            }
            for index, pair in enumerate(pairs)
        ]
        results.sort(key=lambda result: -float(result["relevance_score"]))  # type: ignore[arg-type]
        head = {"id": f"rerank-{engine.requests:016x}", "model": request.model, "usage": usage}
        return {**head, "results": results[: request.top_n or None]}

    return PoolingJob(
        engine, exchange, fate, [[*left, END, *right] for left, right in pairs], adapter, answer
    )


def score(engine: Engine, exchange: Exchange, fate: Fate, request: ScoreRequest, adapter: str) -> PoolingJob:
    """``/v1/score``: one text against each of several, or pair by pair."""
    left, right = _texts(request.text_1 or request.queries), _texts(request.text_2 or request.documents)
    if not left or not right or (len(left) != 1 and len(left) != len(right)):
        raise BadRequestError("text_1 is one text, or as many as text_2; neither may be empty", "text_1")
    pairs = list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))

    def answer(usage: dict[str, int]) -> dict[str, Any]:
        data = [{"index": i, "object": "score", "score": similarity(*pair)} for i, pair in enumerate(pairs)]
        return {**_head("score", engine, request.model), "data": data, "usage": usage}

    return PoolingJob(engine, exchange, fate, [[*one, END, *two] for one, two in pairs], adapter, answer)


def _texts(value: str | list[str] | None) -> list[list[int]]:
    return [encode(text) for text in ([value] if isinstance(value, str) else value or [])]


def _head(kind: str, engine: Engine, model: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{engine.requests:016x}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
    }
