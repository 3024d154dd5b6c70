"""`make demo`: a real small model in two quantization variants, from a YAML file to a streamed token.

Installs an engine for this machine and makes the model when they are not there yet, starts `modelfleet up`,
asks both variants, and prints what they said. With ``DEMO_ONCE=1`` it then ends everything and exits 0, or 1
when an answer is missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "demo"
FILE = BUILD / "smollm2.yaml"
MODEL = "smollm2-135m-instruct"
VARIANTS = ("bf16", "int8")
QUESTION = "What is the capital of France? Answer in one short sentence."
READY_SECONDS = 600.0
HEADERS = ("x-modelfleet-model", "x-modelfleet-variant", "x-modelfleet-replica", "x-request-id")

TEMPLATE = """\
# Written by `make demo`. Edit it while the demo runs: a changed weight moves traffic, a changed engine field
# rolls a new revision out, a removed variant drains.
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


def step(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def make_model() -> dict[str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "modelfleet_serving.demo_model", "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    paths: dict[str, str] = json.loads(result.stdout)
    return paths


def wait_until_ready(process: subprocess.Popen[bytes], environment: dict[str, str]) -> str:
    """The router's address, once both variants serve."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"modelfleet up ended with code {process.returncode}")
        state = Path(environment["MODELFLEET_STATE"], "state.json")
        if state.exists():
            info = json.loads(state.read_bytes())
            rows = [v for d in info["deployments"] for v in d.get("status", {}).get("variants", [])]
            if len(rows) == len(VARIANTS) and all(v["reason"] == "Serving" for v in rows):
                return str(info["router"])
        time.sleep(0.5)
    sys.exit(f"not ready within {READY_SECONDS:.0f} s; `modelfleet get {MODEL}` says why")


def ask(client: openai.OpenAI, model: str) -> bool:
    """Ask one variant and print what it said; whether it said anything."""
    answer = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0
    )
    text = answer.parse().choices[0].message.content or ""
    print(f"\n  model: {model}")
    for header in HEADERS:
        print(f"  {header}: {answer.headers.get(header, '')}")
    print(f"  {QUESTION}\n  > {text.strip()}")
    return bool(text.strip())


def stream(client: openai.OpenAI, model: str) -> bool:
    print(f"\n  model: {model}, streamed\n  > ", end="", flush=True)
    pieces = []
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
    print()
    return bool("".join(pieces).strip())


def main() -> int:
    started = time.monotonic()
    once = os.environ.get("DEMO_ONCE") == "1"
    step("an engine for this machine: vLLM")
    run(sys.executable, "-m", "modelfleet_serving.environments", "install", "vllm")
    step("a real small model in two quantizations: SmolLM2-135M, bf16 and int8 (W8A8)")
    paths = make_model()
    BUILD.mkdir(parents=True, exist_ok=True)
    FILE.write_text(TEMPLATE.format(model=MODEL, bf16=paths["bf16"], int8=paths["w8a8"]))
    print(f"    {FILE.relative_to(ROOT)}")

    step(f"modelfleet up -f {FILE.relative_to(ROOT)}")
    environment = dict(os.environ)
    state = environment.setdefault("MODELFLEET_STATE", tempfile.mkdtemp(prefix="modelfleet-demo-"))
    listen = environment.get("DEMO_LISTEN", "127.0.0.1:8000")
    process = subprocess.Popen(
        [sys.executable, "-m", "modelfleet_operator.cli", "up", "-f", str(FILE), "--listen", listen],
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this script alone, which then ends it in order
    )
    try:
        router = wait_until_ready(process, environment)
        step(f"both variants serve after {time.monotonic() - started:.0f} s; asking them")
        client = openai.OpenAI(base_url=f"{router}/v1", api_key="none", timeout=120)
        good = [ask(client, f"{MODEL}:{variant}") for variant in VARIANTS]
        good.append(stream(client, MODEL))
        if once:
            return 0 if all(good) else 1
        how_to_go_on(router, state)
        process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        stop(process)
    return 0


def how_to_go_on(router: str, state: str) -> None:
    step("it runs until Ctrl-C. In another terminal:")
    print(f"""
  export MODELFLEET_STATE={state}
  .venv/bin/modelfleet get {MODEL}
  .venv/bin/modelfleet chat {MODEL}:int8 "Why is the sky blue?"
  curl {router}/v1/chat/completions -H 'content-type: application/json' -d \\
    '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 32}}'

  Edit {FILE.relative_to(ROOT)} and watch traffic and engines follow.
""")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
