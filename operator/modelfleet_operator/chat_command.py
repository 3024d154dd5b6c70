"""`modelfleet chat`: a conversation through the router, streamed."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final

import aiohttp
import msgspec
from rich.console import Console

from modelfleet_serving.contract import HEADER_FALLBACK, HEADER_REPLICA, HEADER_VARIANT

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"


class ChatError(Exception):
    """The router or the model does not answer."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


async def converse(url: str, model: str, prompt: str | None, api_key: str | None, max_tokens: int) -> None:
    """Ask once, or talk until end of input.

    Raises:
        ChatError: no answer.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=600)
    console = Console(stderr=True, highlight=False)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        messages: list[dict[str, str]] = []
        while True:
            question = prompt if prompt is not None else await _ask(console)
            if question is None:
                return
            messages.append({"role": "user", "content": question})
            answer = await _stream(session, url, model, messages, max_tokens, console)
            messages.append({"role": "assistant", "content": answer})
            if prompt is not None:
                return


async def _ask(console: Console) -> str | None:
    """The next question; ``None`` at the end of input."""
    console.print("[bold]>[/] ", end="")
    line = await asyncio.to_thread(sys.stdin.readline)
    return line.strip() if line else None


async def _stream(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    messages: list[dict[str, str]],
    max_tokens: int,
    console: Console,
) -> str:
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    parts: list[str] = []
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise ChatError(_error_text(answer.status, await answer.read()))
            async for line in answer.content:
                parts.append(_text_of(line))
                sys.stdout.write(parts[-1])
                sys.stdout.flush()
            headers = answer.headers
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ChatError(f"{url} does not answer: {error}") from error
    sys.stdout.write("\n")
    sys.stdout.flush()
    fallback = f", instead of {headers[HEADER_FALLBACK]}" if HEADER_FALLBACK in headers else ""
    console.print(
        f"[dim]{headers.get(HEADER_VARIANT, '?')} on {headers.get(HEADER_REPLICA, '?')}{fallback}[/]"
    )
    return "".join(parts)


def _text_of(line: bytes) -> str:
    """The text of one line of the event stream."""
    if not line.startswith(_DATA) or (data := line.removeprefix(_DATA).strip()) == _DONE:
        return ""
    try:
        chunk = msgspec.json.decode(data, type=_Chunk)
    except msgspec.DecodeError as error:
        raise ChatError(f"answer not understood: {error}") from error
    if chunk.error:
        raise ChatError(str(chunk.error))
    return "".join(c.delta.reasoning_content or c.delta.content or "" for c in chunk.choices)


def _error_text(status: int, content: bytes) -> str:
    try:
        return f"{status}: {msgspec.json.decode(content)['error']['message']}"
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"{status}: {content[:500].decode(errors='replace')}"
