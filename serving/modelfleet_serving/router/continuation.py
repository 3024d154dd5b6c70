"""Continued streams: when a replica dies in the middle of an answer, another one goes on from there.

Interface::

    recorder = Recorder(chunked=True)       # a chat or completions stream; body is what the engine was sent
    recorder.add(data)                      # everything that goes to the client, as it goes: 0.1 us a chunk

    # the replica died after the first byte:
    try:
        going_on = continue_stream(kind is Kind.CHAT, body, recorder.read(), source="r1", target="r2")
    except NotContinuableError as error: ...          # error.reason: a short word, for the metric
    if going_on.body is None:
        client.write(going_on.closing)                # it was complete but for its end
    else:
        ...                                           # send going_on.body to r2; of its answer (200, events):
        data = going_on.splice.feed(payload)          # payload without chunk framing, cut anywhere
        client.write(frame(data)); recorder.add(frame(data))     # it may have to be continued again

**What the client sees**: one stream. Chunks keep ``id``, ``created`` and ``model`` of the first ones; there
is no second role; usage is of the whole (the original prompt, all completion tokens); ``[DONE]`` comes once,
after a comment ``: modelfleet continued from=r1 to=r2`` that clients ignore.

**What is safe.** A chat goes on as an assistant message with the text so far and ``continue_final_message``,
a completion as prompt plus text; ``max_tokens`` and ``min_tokens`` are less what was delivered. Before any
text, the request is simply made again. With text, these are not continued, as the second replica can't know
what the first one had in mind:

- a tool call that has begun, or a forced one (``tool_choice`` other than ``auto`` and ``none``);
- reasoning: chat templates drop it from earlier messages, so the answer would go on without its reasons;
- structured output (``response_format``, ``structured_outputs``...): its grammar would begin anew;
- ``logprobs``, ``n`` or ``best_of`` above 1, beam search, ``echo``, ``suffix``, prompts of token ids or
  several, audio, more than 4 MB of text.

A request with a seed is continued; the rest of its answer is a likely one, not the one that the first replica
would have given. So with penalties: they count the text so far as prompt.

White space at the end of the text is not sent: engines and templates treat it differently, and models answer
oddly after it. When the second replica begins with it again, it is not passed on again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from modelfleet_serving.router.policy.delivered import Delivered
from modelfleet_serving.router.policy.events import DONE, EventSplitter, data_of
from modelfleet_serving.router.policy.recorder import MAX_TEXT, Recorder
from modelfleet_serving.router.policy.stream_usage import ask_usage, may_hold_usage, strip_usage

__all__ = [
    "MAX_TEXT",
    "Continuation",
    "Delivered",
    "NotContinuableError",
    "Recorder",
    "Splice",
    "ask_usage",
    "continue_stream",
    "may_hold_usage",
    "strip_usage",
]

_decode: Final = msgspec.json.decode
_encode: Final = msgspec.json.encode
_TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")

_ABSENT: Final[tuple[Any, ...]] = (None, False, 0, "", [], {})
_FORBIDDEN: Final = {
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
    "structured_outputs": "structured_output",
    "guided_json": "structured_output",
    "guided_regex": "structured_output",
    "guided_choice": "structured_output",
    "guided_grammar": "structured_output",
    "json_schema": "structured_output",
    "regex": "structured_output",
    "ebnf": "structured_output",
    "structural_tag": "structured_output",
    "echo": "echo",
    "suffix": "suffix",
    "use_beam_search": "beam_search",
    "prompt_embeds": "prompt",
    "truncate_prompt_tokens": "prompt",
    "kv_transfer_params": "disaggregated",
    "audio": "audio",
}
"""Members that rule a continuation out when they are set, with the reason. vLLM's and SGLang's names."""


class NotContinuableError(Exception):
    """A stream can't be continued safely.

    Attributes:
        reason: one of few words, for a metric.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the stream can't be continued: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Continuation:
    """How a stream goes on.

    Attributes:
        body: the request to the next replica; ``None`` when nothing is left to generate.
        closing: events that end the client's stream in that case.
        splice: turns the next replica's stream into the rest of the client's.
    """

    body: bytes | None
    closing: bytes
    splice: Splice


def continue_stream(
    chat: bool,
    body: bytes,
    delivered: Delivered | None,
    *,
    source: str,
    target: str,
) -> Continuation:
    """How a stream goes on that broke off.

    Args:
        chat: Chat completions; else completions.
        body: The request as the client sent it, with what the router added.
        delivered: From the recorder.
        source: Id of the replica that died.
        target: Id of the one that goes on.

    Raises:
        NotContinuableError: It can't, and the client must be told that the stream broke off.
    """
    if delivered is None:
        raise NotContinuableError("unreadable")
    comment = f": modelfleet continued from={source} to={target}\n\n".encode()
    if delivered.done:
        return Continuation(None, b"", Splice(delivered, comment, resumed=True))
    if delivered.empty:
        return Continuation(body, b"", Splice(delivered, comment, resumed=False))
    if delivered.finish_reason is not None:
        if len(delivered.finished) < _choices(body):
            raise NotContinuableError("choices")
        return Continuation(None, b"data: [DONE]\n\n", Splice(delivered, comment, resumed=True))
    if delivered.opaque is not None:
        raise NotContinuableError(delivered.opaque)
    try:
        members = _decode(body, type=dict[str, msgspec.Raw])
        _check(members)
        text = delivered.text.rstrip()
        splice = Splice(delivered, comment, resumed=bool(text))
        if not _shorten(members, delivered.tokens):
            return Continuation(None, splice.cut_by_length(chat=chat) + b"data: [DONE]\n\n", splice)
        if text:
            (_extend_chat if chat else _extend_prompt)(members, text)
    except msgspec.DecodeError as error:
        raise NotContinuableError("request") from error
    return Continuation(_encode(members), b"", splice)


class _Asked(msgspec.Struct):
    n: int | None = None
    prompt: Any = None


def _choices(body: bytes) -> int:
    """How many answers a request asks for: ``n`` for each of its prompts."""
    try:
        asked = _decode(body, type=_Asked)
    except msgspec.DecodeError as error:
        raise NotContinuableError("request") from error
    prompts = asked.prompt
    several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    return (asked.n or 1) * (len(prompts) if several else 1)


def _check(members: dict[str, msgspec.Raw]) -> None:
    for name, reason in _FORBIDDEN.items():
        if name in members and _decode(members[name]) not in _ABSENT:
            raise NotContinuableError(reason)
    for name in ("n", "best_of"):
        if name in members and _decode(members[name]) not in (None, 1):
            raise NotContinuableError("choices")
    if "response_format" in members and _decode(members["response_format"]) not in (None, {"type": "text"}):
        raise NotContinuableError("structured_output")
    if "tool_choice" in members and _decode(members["tool_choice"]) not in (None, "auto", "none"):
        raise NotContinuableError("tool_call")
    if "modalities" in members and _decode(members["modalities"]) not in (None, ["text"]):
        raise NotContinuableError("audio")


def _shorten(members: dict[str, msgspec.Raw], tokens: int) -> bool:
    """Takes the delivered tokens off the request's bounds; False when none are left."""
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        bound = _decode(members.get(name, b"null"))
        if isinstance(bound, int) and bound:
            if name != "min_tokens" and bound <= tokens:
                return False
            members[name] = msgspec.Raw(b"%d" % max(0, bound - tokens))
    return True


def _extend_chat(members: dict[str, msgspec.Raw], text: str) -> None:
    messages = _decode(members.get("messages", b""), type=list[msgspec.Raw])
    last: Any = _decode(messages[-1]) if messages else {}
    if _decode(members.get("continue_final_message", b"false")) and last.get("role") == "assistant":
        # The client itself had the engine go on with a message: this is more of it.
        content = last.get("content")
        if isinstance(content, str):
            last["content"] = content + text
        elif isinstance(content, list):
            last["content"] = [*content, {"type": "text", "text": text}]
        else:
            raise NotContinuableError("prompt")
        messages[-1] = msgspec.Raw(_encode(last))
    else:
        messages.append(msgspec.Raw(_encode({"role": "assistant", "content": text})))
    members["messages"] = msgspec.Raw(_encode(messages))
    members["continue_final_message"] = _TRUE
    members["add_generation_prompt"] = _FALSE


def _extend_prompt(members: dict[str, msgspec.Raw], text: str) -> None:
    prompt = _decode(members.get("prompt", b"null"))
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise NotContinuableError("prompt")
    members["prompt"] = msgspec.Raw(_encode(prompt + text))


class Splice:
    """Turns the stream of the replica that goes on into the rest of the client's stream.

    Attributes:
        begun_at: characters that the client had when it began.
        diverged: why the stream can't be passed on after all, or ``None``: the client's stream must be cut.
    """

    def __init__(self, delivered: Delivered, comment: bytes, *, resumed: bool) -> None:
        self.diverged: str | None = None
        self.begun_at = delivered.size
        self._splitter = EventSplitter()
        self._comment = comment
        self._identity = dict(delivered.identity)
        self._roles = set(delivered.roles)
        # A request that is made again has its own usage, and repeats nothing.
        self._tokens = delivered.tokens if resumed else 0
        self._prompt_tokens = delivered.prompt_tokens if resumed else None
        text = delivered.text
        self._repeated = text[len(text.rstrip()) :]
        self._resumed = resumed

    def feed(self, payload: bytes) -> bytes:
        """Events for the client.

        Args:
            payload: The engine's bytes without chunk framing, cut anywhere.
        """
        return b"".join(self._event(event) for event in self._splitter.feed(payload))

    def cut_by_length(self, *, chat: bool) -> bytes:
        """The last chunk of a stream that has had all the tokens it may have."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        choice |= {"delta": dict[str, str]()} if chat else {"text": ""}
        kind = "chat.completion.chunk" if chat else "text_completion"
        return _event({**self._identity, "object": kind, "choices": [choice]})

    def _event(self, event: bytes) -> bytes:
        data = data_of(event)
        if data == DONE:
            return self._comment + event
        if not data:
            return event
        try:
            chunk = _decode(data)
        except msgspec.DecodeError:
            self.diverged = "unreadable"
            return b""
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            return event  # an error of the engine's
        chunk |= self._identity
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._correct(usage)
        had_choices = bool(chunk["choices"])
        chunk["choices"] = [choice for choice in chunk["choices"] if self._keep(choice)]
        if self.diverged or (had_choices and not chunk["choices"]):
            return b""
        return _event(chunk)

    def _keep(self, choice: dict[str, Any]) -> bool:
        """Whether anything of a choice is left once what the client has had is taken out."""
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            choice["text"] = self._once(choice.get("text") or "")
            return bool(choice["text"] or choice.get("finish_reason"))
        if self._resumed and (delta.get("reasoning") or delta.get("reasoning_content")):
            self.diverged = "reasoning"
            return False
        new_role = False
        if "role" in delta:
            index = choice.get("index", 0)
            new_role = index not in self._roles
            self._roles.add(index)
            if not new_role:
                del delta["role"]
        if isinstance(delta.get("content"), str):
            delta["content"] = self._once(delta["content"])
        said = any(value for value in delta.values())
        return new_role or said or choice.get("finish_reason") is not None

    def _once(self, text: str) -> str:
        """Text without the white space at its beginning that the client has had."""
        while text and self._repeated:
            if text[0] != self._repeated[0]:
                self._repeated = ""
                break
            text, self._repeated = text[1:], self._repeated[1:]
        return text

    def _correct(self, usage: dict[str, Any]) -> None:
        """Usage of the whole stream: the text so far was prompt to the second replica only."""
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens") or 0
        if not self._resumed or not isinstance(prompt, int):
            return
        if self._prompt_tokens is None:
            self._prompt_tokens = max(0, prompt - self._tokens)
        usage["prompt_tokens"] = self._prompt_tokens
        usage["completion_tokens"] = completion + self._tokens
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            details["cached_tokens"] = min(details["cached_tokens"], self._prompt_tokens)


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
