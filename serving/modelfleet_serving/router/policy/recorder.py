"""Keeps what a client has got of a stream, so that another replica can go on from there.

While the stream runs, adding to a list is all that happens to a chunk. Every 32 KB what was kept is decoded
and only its text stays, so that a thousand long streams take a few dozen megabytes and not a gigabyte.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from modelfleet_serving.router.policy.events import DONE, EventSplitter, data_of
from modelfleet_serving.router.response import ChunkScanner, FramingError

_COMPACT: Final = 32 * 1024
MAX_TEXT: Final = 4 * 1024 * 1024
"""Characters beyond which a stream is not continued."""


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    logprobs: Any = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    created: int | None = None
    model: str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decode: Final = msgspec.json.Decoder(_Chunk).decode


class Delivered:
    """What a client has got.

    Attributes:
        identity: ``id``, ``created`` and ``model`` of its chunks, once there was one.
        roles: choices that have had their role.
        tokens: generated tokens, as far as they can be told: exact with continuous usage or token ids, else
            the number of chunks with text. Engines send a chunk a token, but put several into one when they
            decode speculatively, batch chunks (``--stream-interval``), or hold back part of a character.
        prompt_tokens: where the stream has told them.
        opaque: what can't be continued, for a reason: tool call, reasoning, logprobs...
    """

    def __init__(self) -> None:
        self.identity: dict[str, str | int] = {}
        self.roles: set[int] = set()
        self.tokens = 0
        self.prompt_tokens: int | None = None
        self.finish_reason: str | None = None
        self.opaque: str | None = None
        self.done = False
        self.size = 0
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All text of choice 0."""
        return "".join(self._texts)

    @property
    def empty(self) -> bool:
        """Nothing but roles: the request can be made again as it was."""
        return not self.size and self.opaque is None and self.finish_reason is None

    def take(self, data: bytes) -> None:
        """Takes one event's data.

        Raises:
            msgspec.DecodeError: It is no chunk.
        """
        if not data:
            return
        if data == DONE:
            self.done = True
            return
        chunk = _decode(data)
        if not self.identity and chunk.id is not None:
            found = {"id": chunk.id, "created": chunk.created, "model": chunk.model}
            self.identity = {name: value for name, value in found.items() if value is not None}
        for choice in chunk.choices:
            self._take_choice(choice)
        usage = chunk.usage
        if usage is not None:
            self.prompt_tokens = (
                usage.prompt_tokens if usage.prompt_tokens is not None else self.prompt_tokens
            )
            self.tokens = max(self.tokens, usage.completion_tokens or 0)

    def _take_choice(self, choice: _Choice) -> None:
        text = choice.text
        delta = choice.delta
        if delta is not None:
            text = delta.content
            if delta.role is not None:
                self.roles.add(choice.index)
            if delta.tool_calls or delta.function_call:
                self.opaque = "tool_call"
            elif delta.reasoning or delta.reasoning_content:
                self.opaque = "reasoning"
            elif delta.refusal or delta.audio:
                self.opaque = "refusal" if delta.refusal else "audio"
        if choice.logprobs:
            self.opaque = "logprobs"
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        if text:
            if choice.index:
                self.opaque = "choices"
            self._texts.append(text)
            self.size += len(text)
            self.tokens += len(choice.token_ids) if choice.token_ids else 1


class Recorder:
    """Takes the bytes that a client gets.

    Args:
        chunked: They are in HTTP's chunks.
    """

    __slots__ = ("_delivered", "_parts", "_scanner", "_size", "_splitter")

    def __init__(self, *, chunked: bool) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._delivered: Delivered | None = Delivered()
        self._splitter = EventSplitter()
        self._scanner = ChunkScanner() if chunked else None

    def add(self, data: bytes) -> None:
        """Takes bytes as they went to the client."""
        if self._delivered is None:
            return
        self._parts.append(data)
        self._size += len(data)
        if self._size > _COMPACT:
            self.read()

    def read(self) -> Delivered | None:
        """What the client has got; ``None`` when that was too much or could not be read."""
        payload = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        delivered = self._delivered
        if delivered is None:
            return None
        try:
            if self._scanner is not None:
                out: list[bytes] = []
                self._scanner.feed(payload, out)
                payload = b"".join(out)
            for event in self._splitter.feed(payload):
                delivered.take(data_of(event))
        except (msgspec.DecodeError, FramingError, UnicodeDecodeError):
            self._delivered = None
        if delivered.size > MAX_TEXT or self._splitter.pending > _COMPACT:
            self._delivered = None
        return self._delivered
