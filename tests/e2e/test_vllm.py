"""From a YAML file to a streamed token with real vLLM and a real model in two quantizations."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.e2e.platform import Platform, until

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.timeout(1500)]

# A small model's greedy answers hang on rounding: what is asserted is who answers, and that it is whole.
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


def ask(platform: Platform, model: str, **options: Any) -> Any:
    return platform.client.chat.completions.with_raw_response.create(
        model=model, messages=QUESTION, temperature=0, **({"max_tokens": 24} | options)
    )


def test_both_variants_answer_as_themselves(real: Platform) -> None:
    for variant in ("bf16", "int8"):
        answer = ask(real, f"smollm2:{variant}")
        assert answer.headers["x-modelfleet-variant"] == variant
        assert answer.headers["x-modelfleet-model"] == "smollm2"
        assert answer.headers["x-request-id"]
        parsed = answer.parse()
        assert len(parsed.choices[0].message.content.split()) > 2
        assert parsed.usage.completion_tokens > 0
        assert parsed.choices[0].finish_reason in ("stop", "length")


def test_a_stream_has_the_same_text_as_a_whole_answer(real: Platform) -> None:
    whole = ask(real, "smollm2:bf16").parse().choices[0].message.content
    chunks = list(
        real.client.chat.completions.create(
            model="smollm2:bf16",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage is not None
    assert len(chunks) > 5


def test_models_lists_the_model_and_its_variants(real: Platform) -> None:
    assert {"smollm2", "smollm2:bf16", "smollm2:int8"} <= {m.id for m in real.client.models.list()}


def test_status_has_the_plan_and_what_the_engine_measured(real: Platform) -> None:
    def measured() -> dict[str, Any] | None:
        rows = real.variants()
        return rows if all(v.get("measurements") for v in rows.values()) else None

    rows = until("measurements in status", measured, 30)
    weights = {name: float(row["plan"]["weightsGiB"]) for name, row in rows.items()}
    assert 0 < weights["int8"] < weights["bf16"] < 0.5
    for row in rows.values():
        planned, measured_tokens = row["plan"]["kvCacheTokens"], row["measurements"][0]["kvCacheTokens"]
        if row["accelerator"] == "CPU":
            assert measured_tokens == planned
        else:
            assert planned <= measured_tokens <= 1.3 * planned


def test_weights_split_requests(real: Platform) -> None:
    """400 requests at 50:50: within four standard deviations of 200."""
    # As short as they get: a processor without int8 instructions reads 25 tokens a second.
    complete = real.client.completions.with_raw_response.create
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: complete(model="smollm2", prompt="2", max_tokens=1), range(400)))
    counts = Counter(a.headers["x-modelfleet-variant"] for a in answers)
    assert sum(counts.values()) == 400
    assert 160 <= counts["bf16"] <= 240, counts


def test_a_killed_engine_loses_no_request_and_comes_back(real: Platform) -> None:
    answers: list[Any] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answers.append(ask(real, "smollm2", max_tokens=4))
            except Exception as error:  # noqa: BLE001  every failure is the finding
                errors.append(error)

    (engine,) = real.engines("w8a8")
    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    until("requests run", lambda: len(answers) > 20, 60)
    engine.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    seen = len(answers)
    until("requests go on", lambda: len(answers) > seen + 20, 60)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {a.headers["x-modelfleet-variant"] for a in answers} == {"bf16", "int8"}

    def back() -> bool:
        try:
            answer = ask(real, "smollm2:int8", max_tokens=1)
        except openai.InternalServerError as error:
            if error.status_code != 503:  # pinned to what is down: 503, and nothing else, until it is back
                raise
            return False
        headers = answer.headers
        return bool(headers["x-modelfleet-variant"] == "int8") and "x-modelfleet-fallback" not in headers

    until("the engine is back", back, 180)
    assert time.monotonic() - killed < 180
    real.wait_ready("bf16", "int8", seconds=60)


def test_a_variant_removed_during_a_stream_ends_it_whole(real: Platform) -> None:
    began = time.monotonic()
    ask(real, "smollm2:int8", max_tokens=16, extra_body={"ignore_eos": True})
    # Long enough to be removed meanwhile, on a GPU and on a processor that writes four tokens a second.
    tokens = min(1500, max(48, int(16 / (time.monotonic() - began) * 12)))
    stream = real.client.chat.completions.create(
        model="smollm2:int8",
        messages=[{"role": "user", "content": "Tell a long story about a ship."}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    iterator = iter(stream)
    first = next(iterator)
    real.edit(r"  - name: int8\n.*?(?=  routing)", "")
    real.edit(r"weights: \{[^}]*\}\n    fallback: \[[^]]*\]", "weights: {bf16: 1}")
    chunks = [first, *iterator]
    # Not one chunk a token: on a busy machine the engine sends several tokens at once.
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    real.wait_ready("bf16", seconds=120)
    until("its engine ends", lambda: real.engines("w8a8") == [], 120)
    assert ask(real, "smollm2").headers["x-modelfleet-variant"] == "bf16"


def test_interrupt_leaves_nothing_running(real: Platform) -> None:
    assert real.engines("-bf16")
    assert real.interrupt() == 0
    assert real.tree() == []
