"""What a client has got of a stream, read from its events."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from modelfleet_serving.router.policy.events import DONE


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

    @property
    def other(self) -> str | None:
        """What it has besides text, as the reason why that can't be continued."""
        if self.tool_calls or self.function_call:
            return "tool_call"
        if self.reasoning or self.reasoning_content:
            return "reasoning"
        if self.refusal or self.audio:
            return "refusal" if self.refusal else "audio"
        return None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    logprobs: Any = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """A chunk of a stream, as far as going on needs it."""

    id: str | None = None
    created: int | None = None
    model: str | None = None
    choices: list[_Choice] = []
    usage: _Usage | None = None


decode: Final = msgspec.json.Decoder(Chunk).decode


class Delivered:
    """What a client has got.

    Attributes:
        identity: ``id``, ``created`` and ``model`` of its chunks, once there was one.
        roles: choices that have had their role.
        tokens: generated tokens, as far as they can be told: exact with continuous usage or token ids, else
            the number of chunks with text. Engines send a chunk a token, but put several into one when they
            decode speculatively, batch chunks (``--stream-interval``), or hold back part of a character.
        finished: choices that have ended.
        prompt_tokens: where the stream has told them.
        opaque: what can't be continued, for a reason: tool call, reasoning, logprobs...
    """

    def __init__(self) -> None:
        self.identity: dict[str, str | int] = {}
        self.roles: set[int] = set()
        self.tokens = 0
        self.prompt_tokens: int | None = None
        self.finish_reason: str | None = None
        self.finished: set[int] = set()
        self.opaque: str | None = None
        self.done = False
        self.size = 0
        self._texts: list[str] = []
        self._settled: list[str] = []

    @property
    def text(self) -> str:
        """All text of choice 0."""
        return "".join(self._settled + self._texts)

    def settle(self) -> None:
        """Joins the text since the last time: tokens one by one take ten times as much memory."""
        if self._texts:
            self._settled.append("".join(self._texts))
            self._texts.clear()

    @property
    def empty(self) -> bool:
        """Nothing but roles: the request can be made again as it was."""
        return not self.size and self.opaque is None and self.finish_reason is None

    def take_data(self, data: bytes) -> None:
        """Takes one event's data.

        Raises:
            msgspec.DecodeError: It is no chunk.
        """
        if data == DONE:
            self.done = True
        elif data:
            self.take(decode(data))

    def take(self, chunk: Chunk) -> None:
        """Takes one chunk."""
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
            if delta.other:
                self.opaque = delta.other
        if choice.logprobs:
            self.opaque = "logprobs"
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
            self.finished.add(choice.index)
        if text:
            if choice.index:
                self.opaque = "choices"
            self._texts.append(text)
            self.size += len(text)
            self.tokens += len(choice.token_ids) if choice.token_ids else 1
