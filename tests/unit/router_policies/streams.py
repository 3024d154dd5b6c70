"""Streams of engines, whole and broken off, and what the router makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelfleet_serving.router.continuation import (
    Continuation,
    Delivered,
    NotContinuableError,
    Recorder,
    continue_stream,
)
from modelfleet_serving.router.policy.events import data_of, events

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Count to six."}],
    "max_tokens": 20,
    "stream": True,
    "seed": 7,
}
TOKENS = ["one", " two", " three", " four", " five", " six"]


def sse(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def chat_chunk(
    delta: dict[str, Any], finish: str | None = None, ident: str = "chatcmpl-1", **extra: Any
) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return sse(
        {
            "id": ident,
            "object": "chat.completion.chunk",
            "created": 100,
            "model": "m",
            "choices": [choice],
            **extra,
        }
    )


def usage_chunk(prompt: int, completion: int, ident: str = "chatcmpl-1", **details: Any) -> bytes:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **details,
    }
    return sse(
        {
            "id": ident,
            "object": "chat.completion.chunk",
            "created": 100,
            "model": "m",
            "choices": [],
            "usage": usage,
        }
    )


def chat_stream(
    tokens: list[str], ident: str = "chatcmpl-1", prompt: int = 12, finish: str = "stop"
) -> bytes:
    return b"".join(
        [
            chat_chunk({"role": "assistant", "content": ""}, ident=ident),
            *(chat_chunk({"content": token}, ident=ident) for token in tokens),
            chat_chunk({}, finish, ident=ident),
            usage_chunk(prompt, len(tokens), ident=ident),
            b"data: [DONE]\n\n",
        ]
    )


def delivered(payload: bytes) -> Delivered:
    recorder = Recorder(chunked=False)
    recorder.add(payload)
    found = recorder.read()
    assert found is not None
    return found


def go_on(payload: bytes, body: dict[str, Any] = CHAT, *, chat: bool = True) -> Continuation:
    return continue_stream(chat, json.dumps(body).encode(), delivered(payload), source="r1", target="r2")


def refused(payload: bytes, body: dict[str, Any] = CHAT, *, chat: bool = True) -> str:
    with pytest.raises(NotContinuableError) as error:
        go_on(payload, body, chat=chat)
    return error.value.reason


def request(going_on: Continuation) -> dict[str, Any]:
    assert going_on.body is not None
    found: dict[str, Any] = json.loads(going_on.body)
    return found


def read(payload: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for event in events(payload) if (data := data_of(event)) and data != b"[DONE]"]


def text_of(payload: bytes) -> str:
    return "".join(
        choice.get("delta", {}).get("content") or choice.get("text") or ""
        for chunk in read(payload)
        for choice in chunk["choices"]
    )


def prefix(count: int) -> bytes:
    """A stream that breaks off after ``count`` tokens."""
    return b"".join(list(events(chat_stream(TOKENS)))[: count + 1])
