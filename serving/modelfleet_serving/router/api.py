"""The engine endpoints that the router relays, and how each names its model."""

from __future__ import annotations

import enum
from typing import Final, NamedTuple


class Kind(enum.Enum):
    """Where a request names its model, and what may be done with its stream."""

    JSON = "json"
    CHAT = "chat"
    """JSON; a stream of chat chunks, which another replica may go on with."""
    COMPLETION = "completion"
    """JSON; a stream of text chunks, which another replica may go on with."""
    MULTIPART = "multipart"
    WEBSOCKET = "websocket"
    """No body: the model stands in the query or in a header."""
    STORED = "stored"
    """No model: the path names what one engine keeps."""


class Operation(NamedTuple):
    """One path of the API."""

    name: str
    """Label in metrics."""
    kind: Kind
    anthropic: bool = False
    """Errors take Anthropic's form."""
    generates: bool = False
    """Continues a prompt: engines keep the prompt's cache, so its beginning matters to the choice."""
    stores: bool = False
    """The engine may keep the answer, for later calls that name its id."""
    methods: tuple[bytes, ...] = (b"POST",)


OPERATIONS: Final[dict[bytes, Operation]] = {
    b"/v1/chat/completions": Operation("chat", Kind.CHAT, generates=True),
    b"/v1/completions": Operation("completions", Kind.COMPLETION, generates=True),
    b"/v1/responses": Operation("responses", Kind.JSON, generates=True, stores=True),
    b"/v1/messages": Operation("messages", Kind.JSON, anthropic=True, generates=True),
    b"/v1/messages/count_tokens": Operation("count_tokens", Kind.JSON, anthropic=True),
    b"/v1/embeddings": Operation("embeddings", Kind.JSON),
    b"/v2/embed": Operation("embeddings", Kind.JSON),
    b"/v1/rerank": Operation("rerank", Kind.JSON),
    b"/v2/rerank": Operation("rerank", Kind.JSON),
    b"/rerank": Operation("rerank", Kind.JSON),
    b"/v1/score": Operation("score", Kind.JSON),
    b"/score": Operation("score", Kind.JSON),
    b"/classify": Operation("classify", Kind.JSON),
    b"/v1/classify": Operation("classify", Kind.JSON),
    b"/pooling": Operation("pooling", Kind.JSON),
    b"/v1/pooling": Operation("pooling", Kind.JSON),
    b"/v1/moderations": Operation("moderations", Kind.JSON),
    b"/tokenize": Operation("tokenize", Kind.JSON),
    b"/v1/tokenize": Operation("tokenize", Kind.JSON),
    b"/detokenize": Operation("detokenize", Kind.JSON),
    b"/v1/detokenize": Operation("detokenize", Kind.JSON),
    b"/v1/audio/speech": Operation("speech", Kind.JSON),
    b"/v1/images/generations": Operation("images", Kind.JSON),
    b"/v1/audio/transcriptions": Operation("transcriptions", Kind.MULTIPART),
    b"/v1/audio/translations": Operation("translations", Kind.MULTIPART),
    b"/v1/realtime": Operation("realtime", Kind.WEBSOCKET, methods=(b"GET",)),
}

STORED_PREFIX: Final = b"/v1/responses/"
_STORED: Final = Operation("response", Kind.STORED, methods=(b"GET", b"DELETE"))
_STORED_PARTS: Final[dict[bytes, Operation]] = {
    b"cancel": Operation("response_cancel", Kind.STORED),
    b"input_items": Operation("response_items", Kind.STORED, methods=(b"GET",)),
}


def find_operation(path: bytes) -> Operation | None:
    """The operation of a path, ``None`` where engines serve nothing."""
    operation = OPERATIONS.get(path)
    if operation is not None or not path.startswith(STORED_PREFIX):
        return operation
    response, slash, part = path[len(STORED_PREFIX) :].partition(b"/")
    if not response:
        return None
    return _STORED_PARTS.get(part) if slash else _STORED


MODELS_PATH: Final = b"/v1/models"
