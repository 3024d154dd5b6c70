"""What the two demos share: the model, the questions, and how they end.

A demo exits 0 when everything asked for was answered, 1 when something is missing or wrong, 130 when it was
interrupted before that.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import openai

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "demo"
FILE = BUILD / "smollm2.yaml"
MODEL = "smollm2-135m-instruct"
VARIANTS = ("bf16", "int8")
QUESTION = "What is the capital of France? Answer in one short sentence."
READY_SECONDS = 600.0
INTERRUPTED = 130
"""As shells count: 128 and SIGINT."""
_HEADERS = ("x-modelfleet-model", "x-modelfleet-variant", "x-modelfleet-replica", "x-request-id")

TEMPLATE = """\
# Written by `make {target}`. {hint}
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata:
  name: {model}
spec:
  model:
    source: file://{bf16}
  engine:
    type: vLLM
    maxModelLen: 2048
    maxNumSeqs: 16
  variants:
  - name: bf16
    accelerators: [{{type: CPU}}]
  - name: int8
    source: file://{int8}
    quantization: CompressedTensors
    accelerators: [{{type: CPU}}]
  routing:
    weights: {{bf16: 20, int8: 80}}
    fallback: [int8, bf16]
"""


class DemoError(Exception):
    """The demo can't go on; the message says what to do about it."""


def exit_code(demo: Callable[[], bool]) -> int:
    """Run a demo, which tells whether everything was answered; its exit status."""
    # SIGINT too: a shell starts what runs in its background with SIGINT ignored.
    _on_signals(_interrupt)
    try:
        return 0 if demo() else 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left running", file=sys.stderr)
        return INTERRUPTED
    except subprocess.CalledProcessError as error:  # it has said why
        print(f"\nerror: {' '.join(map(str, error.cmd[1:]))} failed", file=sys.stderr)
        return 1
    except DemoError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def no_more_interrupts() -> None:
    """From here on everything ends by itself; a further Ctrl-C is told so."""
    _on_signals(lambda *_: print(" ending, a moment more", file=sys.stderr, flush=True))


def once() -> bool:
    """Whether to ask, clean up and exit: ``DEMO_ONCE=1``."""
    return os.environ.get("DEMO_ONCE") == "1"


def step(text: str) -> None:
    """A headline."""
    print(f"\n==> {text}", flush=True)


def listen_address(default: str) -> str:
    """The router's address: ``DEMO_LISTEN`` or `default`; checked before anything takes time.

    Raises:
        DemoError: it can't be listened on.
    """
    listen = os.environ.get("DEMO_LISTEN") or default
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise DemoError(f"DEMO_LISTEN={listen} is not HOST:PORT")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DemoError(
                f"the router can't listen on {listen}: {reason}. Another address: DEMO_LISTEN=127.0.0.1:8001"
            ) from error
    return listen


def install_engine() -> None:
    """An engine for this machine, unless it is there."""
    step("an engine for this machine: vLLM")
    command = [sys.executable, "-m", "modelfleet_serving.environments", "install", "vllm"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout.partition(":")[0])


def write_file(target: str, hint: str) -> None:
    """Make the model, unless it is there, and write its ModelDeployment."""
    step("a real small model in two quantizations: SmolLM2-135M, bf16 and int8 (W8A8)")
    command = [sys.executable, "-m", "modelfleet_serving.demo_model", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    paths: dict[str, str] = json.loads(done.stdout)
    BUILD.mkdir(parents=True, exist_ok=True)
    text = TEMPLATE.format(target=target, hint=hint, model=MODEL, bf16=paths["bf16"], int8=paths["w8a8"])
    FILE.write_text(text)
    print(FILE.relative_to(ROOT))


def ask_all(router: str) -> bool:
    """Ask both variants, and the model as a stream, and print what they say; whether all said something."""
    client = openai.OpenAI(base_url=f"{router}/v1", api_key="none", timeout=120)
    with client:
        return all([*(_ask(client, f"{MODEL}:{variant}") for variant in VARIANTS), _stream(client, MODEL)])


def _ask(client: openai.OpenAI, model: str) -> bool:
    print(f"\n  model: {model}")
    try:
        answer = client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0
        )
        choices = answer.parse().choices
    except openai.OpenAIError as error:
        return _missing(error)
    text = (choices[0].message.content or "").strip() if choices else ""
    for header in _HEADERS:
        print(f"  {header}: {answer.headers.get(header, '')}")
    print(f"  {QUESTION}\n  > {text}", flush=True)
    return bool(text) or _missing("it is empty")


def _stream(client: openai.OpenAI, model: str) -> bool:
    print(f"\n  model: {model}, streamed\n  Name three fruits.\n  > ", end="", flush=True)
    pieces = []
    try:
        chunks: Any = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Name three fruits."}],
            max_tokens=40,
            temperature=0,
            stream=True,
        )
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
                print(pieces[-1].replace("\n", " "), end="", flush=True)
    except openai.OpenAIError as error:
        return _missing(error)
    print(flush=True)
    return bool("".join(pieces).strip()) or _missing("it is empty")


def _missing(why: object) -> bool:
    print(f"  the answer is missing: {why}", flush=True)
    return False
