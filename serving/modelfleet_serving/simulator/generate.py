"""Chat and completion answers, whole and streamed."""

from __future__ import annotations

import codecs
import time
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from modelfleet_serving.simulator.engine import Engine
from modelfleet_serving.simulator.faults import Fate
from modelfleet_serving.simulator.http import Exchange
from modelfleet_serving.simulator.requests import (
    BadRequestError,
    ChatRequest,
    CompletionRequest,
    Generation,
    chat_tokens,
    prompts,
)
from modelfleet_serving.simulator.scheduler import Sequence
from modelfleet_serving.simulator.text import TOKENS, VOCABULARY, advance, natural_length, start_state
from modelfleet_serving.simulator.tokens import END, decode
from modelfleet_serving.simulator.tools import Script, script_for

_PIECES: Final = {token: piece.encode() for token, piece in zip(TOKENS, VOCABULARY, strict=True)}
_json = msgspec.json.encode


def _quoted(text: str) -> bytes:
    """A text inside JSON quotes, without them."""
    return _json(text)[1:-1]


@dataclass(frozen=True)
class Plan:
    """What one prompt leads to."""

    tokens: list[int]
    max_tokens: int
    limited: bool
    """Something cuts the answer off, so that it ends with ``length``."""
    seeds: tuple[str | int, ...]
    script: Script | None = None
    echo: str = ""

    def state(self, number: int) -> int:
        """Where the text of a choice begins."""
        return advance(start_state(*self.seeds, number), self.tokens)


def chat_plan(engine: Engine, request: ChatRequest, adapter: str) -> Plan:
    """The plan for a chat.

    Raises:
        BadRequestError: when the engine would refuse it.
    """
    tokens, begin = chat_tokens(request)
    limit = request.max_completion_tokens or request.max_tokens
    script = None if request.continue_final_message else script_for(request)
    return _plan(engine, request, adapter, tokens, limit, begin=begin, script=script)


def completion_plans(engine: Engine, request: CompletionRequest, adapter: str) -> list[Plan]:
    """The plans for a completion's prompts.

    Raises:
        BadRequestError: when the engine would refuse it.
    """
    return [
        _plan(
            engine,
            request,
            adapter,
            tokens or [END],
            request.max_tokens or 16,
            echo=decode(tokens) if request.echo else "",
        )
        for tokens in prompts(request.prompt, "prompt")
    ]


def _plan(
    engine: Engine,
    request: Generation,
    adapter: str,
    tokens: list[int],
    limit: int | None,
    *,
    begin: int | None = None,
    script: Script | None = None,
    echo: str = "",
) -> Plan:
    config = engine.config
    room = config.max_model_len - len(tokens)
    if room < (limit or 1):
        raise BadRequestError(
            f"This model's maximum context length is {config.max_model_len} tokens. However, you requested "
            f"{len(tokens) + (limit or 1)} tokens ({len(tokens)} in the prompt, {limit or 1} to generate).",
            "messages" if isinstance(request, ChatRequest) else "prompt",
        )
    seeds = (config.seed, request.seed or 0, adapter)
    if limit is not None:
        return Plan(tokens, limit, True, seeds, script, echo)
    if script is not None:
        return Plan(tokens, min(room, len(script.tokens)), len(script.tokens) > room, seeds, script, echo)
    # Counted from where the answer began, so that continuing it doesn't make it longer.
    begin = len(tokens) if begin is None else begin
    length = natural_length(advance(start_state(*seeds), tokens[:begin]), config.output_tokens)
    wanted = max(1, length - (len(tokens) - begin))
    return Plan(tokens, min(wanted, room), wanted > room, seeds, None, echo)


class Job:
    """A request's answer in the making: one or more choices."""

    def __init__(
        self, engine: Engine, exchange: Exchange, request: Generation, fate: Fate, kind: str
    ) -> None:
        self.engine = engine
        self.exchange = exchange
        self.request = request
        self.fate = fate
        self.chat = isinstance(request, ChatRequest)
        self.id = f"{kind}-{exchange.request.headers.get('x-request-id') or f'{engine.requests:016x}'}"
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.open = 0

    def add(self, plan: Plan, adapter: str) -> None:
        """Adds the choices of one prompt."""
        for number in range(self.request.n or 1):
            sequence = Sequence(
                list(plan.tokens),
                plan.max_tokens,
                state=plan.state(number),
                script=plan.script.tokens if plan.script else None,
                adapter=adapter,
                stall_after=self.fate.stall_after,
            )
            kind = StreamedChoice if self.request.stream else Choice
            sequence.owner = choice = kind(self, len(self.choices), sequence, plan)
            self.choices.append(choice)

    def start(self) -> None:
        """Queues all choices; 503 when there is no place for them."""
        if self.exchange.closed:
            return
        self.exchange.on_close = self.cancel
        for choice in self.choices:
            if not self.engine.submit(choice.sequence):
                self.choices = self.choices[: self.open]
                self.cancel()
                self.exchange.send(
                    503,
                    error("the queue is full", "ServiceUnavailableError", 503),
                    headers="retry-after: 1\r\n",
                )
                return
            self.open += 1
        if self.request.stream:
            self.exchange.start_stream()

    def cancel(self) -> None:
        """Ends what still runs: the client is gone, or the engine is going."""
        for choice in self.choices:
            self.engine.abort(choice.sequence)

    def ended(self) -> None:
        """A choice is complete."""
        self.open -= 1
        if self.open:
            return
        if not self.request.stream:
            self.exchange.send(200, self._body())
            return
        options = self.request.stream_options
        if options is not None and options.include_usage:
            last = {**self.envelope(stream=True), "choices": [], "usage": self.usage()}
            self.exchange.write(b"data: " + _json(last) + b"\n\n")
        self.exchange.write(b"data: [DONE]\n\n")
        self.exchange.end()

    def envelope(self, *, stream: bool) -> dict[str, Any]:
        """The fields around the choices."""
        kind = (
            "text_completion" if not self.chat else "chat.completion.chunk" if stream else "chat.completion"
        )
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def usage(self) -> dict[str, Any]:
        """Tokens: each prompt counts once, however many choices it has."""
        choices = self.choices[:: self.request.n or 1]
        prompt = sum(choice.sequence.prompt_length for choice in choices)
        cached = sum(choice.sequence.cached for choice in choices)
        completion = sum(choice.sequence.generated for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _body(self) -> dict[str, Any]:
        choices = [choice.body() for choice in self.choices]
        return {**self.envelope(stream=False), "choices": choices, "usage": self.usage()}


class Choice:
    """One choice, collected until it is whole."""

    def __init__(self, job: Job, index: int, sequence: Sequence, plan: Plan) -> None:
        script = plan.script
        self.job = job
        self.index = index
        self.sequence = sequence
        self.script = script
        self.echo = plan.echo
        self.limited = plan.limited
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None
        self._stops = job.request.stops()
        self._text = ""
        """What was said, as far as it can't be the beginning of a stop sequence any more."""
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def token(self, sequence: Sequence, token: int) -> None:
        """Takes a token."""
        if self.finish_reason is not None:
            return
        reset = self.job.fate.reset_after
        if reset is not None and sequence.generated > reset:
            self.job.exchange.reset()
            return
        piece = _PIECES.get(token)
        text = self._decoder.decode(
            piece if piece is not None else token_bytes(token), final=sequence.finished
        )
        if self._say(text):
            self._end_at_stop()
        elif sequence.finished:
            self._flush()
            reason = self._reason()
            self.job.engine.finished(sequence, "length" if reason == "length" else "stop")
            self.finish(reason)

    def pooled(self, sequence: Sequence) -> None:
        """Never: a choice has output."""

    def finish(self, reason: str) -> None:
        """The choice is complete."""
        self.finish_reason = reason
        self.job.ended()

    def body(self) -> dict[str, Any]:
        """As it stands in the answer."""
        ends = {"finish_reason": self.finish_reason, "stop_reason": self.stop_reason, "logprobs": None}
        if not self.job.chat:
            return {"index": self.index, "text": self.echo + self._text, **ends}
        message: dict[str, Any] = {"role": "assistant", "content": self._text}
        if self.script and self.script.tool:
            message["content"] = None
            message["tool_calls"] = [self.script.call(self.job.id, self._text)]
        return {"index": self.index, "message": message, **ends}

    def emit(self, text: str) -> None:
        """More text is certain."""
        self._text += text

    def _reason(self) -> str:
        if self.script is None:
            return "length" if self.limited else "stop"
        if self.sequence.generated < len(self.script.tokens):
            return "length"
        return "tool_calls" if self.script.tool else "stop"

    def _say(self, text: str) -> bool:
        """Passes on what is certain; ``True`` when a stop sequence has come up."""
        if not self._stops:
            if text:
                self.emit(text)
            return False
        self._held += text
        for stop in self._stops:
            at = self._held.find(stop)
            if at >= 0:
                self._held = self._held[:at]
                self.stop_reason = stop
        if self.stop_reason is not None:
            return True
        certain = len(self._held) - (max(map(len, self._stops)) - 1)
        if certain > 0:
            self.emit(self._held[:certain])
            self._held = self._held[certain:]
        return False

    def _end_at_stop(self) -> None:
        self._flush()
        if self.sequence.finished:
            self.job.engine.finished(self.sequence, "stop")
        else:
            self.job.engine.abort(self.sequence, "stop")
        self.finish("stop")

    def _flush(self) -> None:
        if self._held:
            self.emit(self._held)
            self._held = ""


class StreamedChoice(Choice):
    """One choice, sent piece by piece.

    What surrounds a piece never changes, and a piece of free text always has four bytes: a whole chunk is
    three byte strings put together.
    """

    def __init__(self, job: Job, index: int, sequence: Sequence, plan: Plan) -> None:
        super().__init__(job, index, sequence, plan)
        script = plan.script
        self._begun = False
        envelope = _json(job.envelope(stream=True))[:-1]
        head = envelope + b',"choices":[{"index":%d,' % index
        if not job.chat:
            self._before, self._after = head + b'"text":"', b'","logprobs":null,"finish_reason":null}]}\n\n'
        elif script is not None and script.tool:
            self._before = head + b'"delta":{"tool_calls":[{"index":0,"function":{"arguments":"'
            self._after = b'"}}]},"logprobs":null,"finish_reason":null}]}\n\n'
        else:
            self._before = head + b'"delta":{"content":"'
            self._after = b'"},"logprobs":null,"finish_reason":null}]}\n\n'
        self._before = b"data: " + self._before
        size = len(self._before) + 4 + len(self._after)
        self._chunk_before = b"%x\r\n" % size + self._before
        self._chunk_after = self._after + b"\r\n"
        self._plain = not self._stops and script is None and job.fate.reset_after is None
        self._write = job.exchange.transport.write

    def token(self, sequence: Sequence, token: int) -> None:
        """Sends a token."""
        if self._begun and self._plain and not sequence.finished:
            if not self.job.exchange.closed:
                self._write(self._chunk_before + _PIECES[token] + self._chunk_after)
            return
        if not self._begun:
            self._begun = True
            self._begin()
        super().token(sequence, token)

    def _begin(self) -> None:
        """The first chunk of a chat has the role, and of a tool call its name."""
        if self.job.chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            if self.script is not None and self.script.tool:
                call = self.script.call(self.job.id, "")
                delta = {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **call}]}
            self._send({"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None})
        elif self.echo:
            self.emit(self.echo)

    def emit(self, text: str) -> None:
        """Sends text that is certain."""
        self.job.exchange.write(self._before + _quoted(text) + self._after)

    def finish(self, reason: str) -> None:
        """Sends the last chunk."""
        choice: dict[str, Any] = {"index": self.index, "logprobs": None, "finish_reason": reason}
        choice["stop_reason"] = self.stop_reason
        if self.job.chat:
            choice["delta"] = {}
        else:
            choice["text"] = ""
        self._send(choice)
        super().finish(reason)

    def _send(self, choice: dict[str, Any]) -> None:
        chunk = {**self.job.envelope(stream=True), "choices": [choice]}
        self.job.exchange.write(b"data: " + _json(chunk) + b"\n\n")


def token_bytes(token: int) -> bytes:
    """What a token stands for; part of a character, perhaps."""
    length = (token.bit_length() - 1) // 8
    return token.to_bytes(length + 1, "big")[1:] if token >> (8 * length) == 1 else decode((token,)).encode()


def error(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """An error as vLLM words it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
