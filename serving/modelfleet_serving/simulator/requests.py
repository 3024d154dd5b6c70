"""The requests that the simulator understands, and the prompts they make."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Final, TypeVar

import msgspec

from modelfleet_serving.simulator.tokens import BYTES_PER_TOKEN, END, IMAGE, encode, role_token

IMAGE_TOKENS: Final = 256
"""Tokens of a picture, whatever its size."""

T = TypeVar("T")
Positive = Annotated[int, msgspec.Meta(ge=1)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]


class BadRequestError(ValueError):
    """A request that an engine would refuse with 400."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(msgspec.Struct):
    """``stream_options``."""

    include_usage: bool = False


class Generation(msgspec.Struct, kw_only=True):
    """What chat and completion requests share. Sampling parameters are taken and mean nothing here."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Positive | None = None
    stop: str | list[str] | None = None
    seed: int | None = None

    def stops(self) -> list[str]:
        """Stop sequences that aren't empty."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]


class Message(msgspec.Struct):
    """A message of a chat."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(Generation, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None


class CompletionRequest(Generation, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any]
    echo: bool = False


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/embeddings`` and ``/classify``."""

    model: str
    input: str | list[Any]
    encoding_format: str = "float"
    dimensions: Positive | None = None


class RerankRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/rerank``."""

    model: str
    query: str
    documents: list[str]
    top_n: int = 0


class ScoreRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/score``; vLLM also calls the texts queries and documents."""

    model: str
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /tokenize``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None


class AdapterRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    lora_name: str
    lora_path: str = ""
    load_inplace: bool = False


def read(body: bytes, kind: type[T]) -> T:
    """A request of a kind.

    Raises:
        BadRequestError: naming the field that is wrong.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise BadRequestError(str(error)) from error


def chat_tokens(request: ChatRequest) -> tuple[list[int], int]:
    """The tokens of a chat's prompt, and where the answer begins: before the end, when it is continued."""
    if not request.messages:
        raise BadRequestError("messages must not be empty", "messages")
    generate = request.add_generation_prompt
    if request.continue_final_message and generate:
        raise BadRequestError("continue_final_message and add_generation_prompt can't both be true")
    tokens = tool_tokens(request.tools)
    start = 0
    for message in request.messages:
        tokens.append(role_token(message.role))
        start = len(tokens)
        tokens += message_tokens(message)
        tokens.append(END)
    if request.continue_final_message:
        tokens.pop()
        return tokens, start
    if generate is not False:
        tokens.append(role_token("assistant"))
    return tokens, len(tokens)


def tool_tokens(tools: list[dict[str, Any]] | None) -> list[int]:
    """Tool definitions, which stand at the very beginning."""
    if not tools:
        return []
    return [role_token("system"), *encode(msgspec.json.encode(tools).decode()), END]


def message_tokens(message: Message) -> list[int]:
    """The tokens of a message's content."""
    tokens: list[int] = []
    parts = (
        [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
    )
    for part in parts or []:
        if part.get("type") in {"text", "input_text"}:
            tokens += encode(str(part.get("text", "")))
        else:
            tokens += _media_tokens(part)
    if message.tool_calls:
        tokens += encode(msgspec.json.encode(message.tool_calls).decode())
    return tokens


def _media_tokens(part: dict[str, Any]) -> list[int]:
    """Equal pictures have equal tokens, so they are found in the prefix cache, and different ones aren't."""
    digest = hashlib.blake2b(msgspec.json.encode(part, order="deterministic"), digest_size=BYTES_PER_TOKEN)
    content = int.from_bytes(b"\x01" + digest.digest(), "big")
    return [IMAGE, *[content] * (IMAGE_TOKENS - 1)]


def prompts(value: str | list[Any], param: str) -> list[list[int]]:
    """The prompts of a field that takes a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [encode(value)]
    if value and all(isinstance(item, int) for item in value):
        return [value]
    found = []
    for item in value:
        if isinstance(item, str):
            found.append(encode(item))
        elif isinstance(item, list) and item and all(isinstance(token, int) for token in item):
            found.append(item)
        else:
            raise BadRequestError(f"{param} must be a text, token ids, or a list of either", param)
    if not found:
        raise BadRequestError(f"{param} must not be empty", param)
    if any(token < 0 or token >= 1 << 63 for tokens in found for token in tokens):
        raise BadRequestError(f"{param}: a token id is out of range", param)
    return found
