"""The simulator as the openai client sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from tests.unit.simulator.conftest import Connect, Start, until, url

from modelfleet_serving.simulator.server import Simulator

Client = tuple[Simulator, AsyncOpenAI]
ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


async def chat(client: AsyncOpenAI, messages: Any = ASK, **options: Any) -> Any:
    return await client.chat.completions.create(model=options.pop("model", "m"), messages=messages, **options)


async def text_of(stream: Any) -> tuple[str, list[Any]]:
    chunks = [chunk async for chunk in stream]
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    return "".join(parts), chunks


async def test_a_chat_and_its_stream_say_the_same(client: Client) -> None:
    _, api = client
    whole = await chat(api, max_tokens=12)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].message.content) == 48
    stream = await chat(api, max_tokens=12, stream=True, stream_options={"include_usage": True})
    text, chunks = await text_of(stream)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert sum(1 for chunk in chunks if chunk.choices and chunk.choices[0].delta.content) == 12


async def test_without_a_limit_an_answer_ends_by_itself(client: Client) -> None:
    _, api = client
    answer = await chat(api)
    assert answer.choices[0].finish_reason == "stop"
    assert 64 <= answer.usage.completion_tokens <= 193


async def test_the_seed_decides_and_nothing_else(client: Client, start: Start, connect: Connect) -> None:
    _, api = client
    other = connect(await start())
    one = (await chat(api, max_tokens=8)).choices[0].message.content
    assert one == (await chat(other, max_tokens=8)).choices[0].message.content
    assert one != (await chat(api, max_tokens=8, seed=5)).choices[0].message.content
    assert one != (await chat(api, max_tokens=8, model="adapter")).choices[0].message.content


async def test_choices_differ_and_share_their_prompt(client: Client) -> None:
    _, api = client
    answer = await chat(api, n=3, max_tokens=6)
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens == (await chat(api, max_tokens=1)).usage.prompt_tokens
    stream = await chat(api, n=3, max_tokens=6, stream=True)
    said = {0: "", 1: "", 2: ""}
    async for chunk in stream:
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(said.values()) == [choice.message.content for choice in answer.choices]


async def test_a_stop_sequence_ends_an_answer_and_is_not_part_of_it(client: Client) -> None:
    _, api = client
    text = (await chat(api, max_tokens=20)).choices[0].message.content
    stop = text[21:27]  # across tokens
    expected = text[: text.index(stop)]
    answer = await chat(api, max_tokens=20, stop=[stop, "never"])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    assert answer.usage.completion_tokens < 20
    streamed, chunks = await text_of(await chat(api, max_tokens=20, stop=stop, stream=True))
    assert streamed == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_an_answer_that_was_broken_off_goes_on_where_it_ended(client: Client) -> None:
    _, api = client
    whole = (await chat(api)).choices[0].message.content
    part = {"role": "assistant", "content": whole[:40]}
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    rest = await chat(api, [*ASK, part], extra_body=extra)
    assert whole[:40] + rest.choices[0].message.content == whole


async def test_a_conversation_finds_its_beginning_in_the_cache(client: Client) -> None:
    simulator, api = client
    messages: list[Any] = [{"role": "system", "content": "Be brief. " * 20}, *ASK]
    first = await chat(api, messages, max_tokens=64)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    again = await chat(api, messages, max_tokens=1)
    prompt = again.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens == (prompt - 1) // 16 * 16
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *ASK]
    turn = await chat(api, messages, max_tokens=1)
    assert turn.usage.prompt_tokens_details.cached_tokens == (prompt + 64 - 1) // 16 * 16
    counters = simulator.engine.scheduler.counters
    assert counters.cache_queries == 2 * prompt + turn.usage.prompt_tokens
    async with aiohttp.ClientSession(url(simulator)) as session, session.get("/metrics") as response:
        exposition = await response.text()
    assert (
        f'vllm:prefix_cache_hits_total{{engine="0",model_name="m"}} {counters.cache_hits:.1f}' in exposition
    )
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 3.0' in exposition
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 3.0' in exposition


async def test_completions_take_texts_and_tokens(client: Client) -> None:
    _, api = client
    one = await api.completions.create(model="m", prompt="Once upon a time", max_tokens=4, echo=True)
    assert one.choices[0].text.startswith("Once upon a time")
    assert one.usage is not None
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (4, 4)
    many = await api.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=3)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (2, 12)
    stream = await api.completions.create(model="m", prompt=[1, 2, 3], max_tokens=3, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert len(text) == 12


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


async def test_a_tool_is_called_when_it_is_demanded_or_named(client: Client) -> None:
    _, api = client
    answer = await chat(api, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "text", "days": 1}
    named = [{"role": "user", "content": "use get_weather"}]
    assert (await chat(api, named, tools=TOOLS)).choices[0].message.tool_calls
    assert not (await chat(api, tools=TOOLS, max_tokens=2)).choices[0].message.tool_calls
    assert (
        not (await chat(api, named, tools=TOOLS, tool_choice="none", max_tokens=2))
        .choices[0]
        .message.tool_calls
    )
    arguments = ""
    async for chunk in await chat(api, tools=TOOLS, tool_choice="required", stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or ""
    assert arguments == call.function.arguments


async def test_json_answers_keep_their_schema(client: Client) -> None:
    _, api = client
    schema = {"type": "object", "properties": {"ünit": {"enum": ["€", "$"]}, "n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = await chat(api, response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"ünit": "€", "n": 1}
    streamed, _ = await text_of(await chat(api, response_format=form, stream=True))
    assert streamed == answer.choices[0].message.content
    cut = await chat(api, response_format=form, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"


async def test_embeddings_are_repeatable_unit_vectors(client: Client) -> None:
    _, api = client
    answer = await api.embeddings.create(model="m", input=["some words here", "some words here", "other"])
    first, second, third = (item.embedding for item in answer.data)
    assert first == second != third
    assert len(first) == 384
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    plain = await api.embeddings.create(
        model="m", input="some words here", encoding_format="float", dimensions=8
    )
    assert len(plain.data[0].embedding) == 8
    assert plain.usage.prompt_tokens == 4


async def test_models_and_adapters_are_listed_as_the_simulator_s(client: Client) -> None:
    simulator, api = client
    models = {model.id: model async for model in api.models.list()}
    assert models.keys() == {"m", "adapter"}
    assert {model.owned_by for model in models.values()} == {"modelfleet-simulator"}
    async with aiohttp.ClientSession(url(simulator)) as session:
        body = {"lora_name": "late", "lora_path": "/adapters/late"}
        async with session.post("/v1/load_lora_adapter", json=body) as response:
            assert response.status == 200
            assert response.headers["server"] == "modelfleet-simulator"
        async with session.post("/v1/load_lora_adapter", json=body) as response:
            assert response.status == 400
        assert (await chat(api, model="late", max_tokens=1)).model == "late"
        async with session.post("/v1/unload_lora_adapter", json={"lora_name": "late"}) as response:
            assert response.status == 200
        async with session.post("/v1/unload_lora_adapter", json={"lora_name": "late"}) as response:
            assert response.status == 404
    with pytest.raises(openai.NotFoundError, match="`late` does not exist"):
        await chat(api, model="late")


async def test_what_an_engine_refuses_is_refused(client: Client) -> None:
    _, api = client
    with pytest.raises(openai.BadRequestError, match="maximum context length is 32768 tokens"):
        await chat(api, max_tokens=40000)
    with pytest.raises(openai.BadRequestError, match=r"\$\.max_tokens"):
        await chat(api, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="messages must not be empty"):
        await chat(api, [])
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        await chat(api, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "other"}})


async def test_scores_and_classes(client: Client) -> None:
    simulator, _ = client
    async with aiohttp.ClientSession(url(simulator)) as session:

        async def post(path: str, body: dict[str, Any]) -> Any:
            async with session.post(path, json={"model": "m", **body}) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        documents = ["nothing here", "the capital of France", "more"]
        ranked = await post(
            "/v1/rerank", {"query": "the capital of Spain", "documents": documents, "top_n": 2}
        )
        assert next(result["index"] for result in ranked["results"]) == 1
        assert len(ranked["results"]) == 2
        scored = await post("/score", {"text_1": "same", "text_2": ["same", "else"]})
        assert [item["score"] for item in scored["data"]] == [1.0, 0.0]
        (label,) = (await post("/classify", {"input": "good"}))["data"]
        assert label["label"] in {"POSITIVE", "NEGATIVE"}
        assert sum(label["probs"]) == pytest.approx(1)
        tokens = await post("/tokenize", {"prompt": "héllo wörld"})
        assert tokens["count"] == len(tokens["tokens"]) == 4
        assert (await post("/detokenize", {"tokens": tokens["tokens"]}))["prompt"] == "héllo wörld"
        messages = await post("/tokenize", {"messages": ASK})
        assert messages["count"] == 11


async def test_a_task_has_its_endpoints_and_no_others(start: Start, connect: Connect) -> None:
    api = connect(await start("--task", "embed"))
    assert (await api.embeddings.create(model="m", input="x")).data
    with pytest.raises(openai.NotFoundError):
        await chat(api)


async def test_a_client_that_goes_away_frees_its_place(start: Start, connect: Connect) -> None:
    simulator = await start("--max-num-seqs", "1", "--decode-base-ms", "20")
    api = connect(simulator)
    stream = await chat(api, max_tokens=10_000, stream=True)
    await anext(aiter(stream))
    assert len(simulator.engine.scheduler.running) == 1
    await stream.close()
    answer = await chat(api, max_tokens=1)
    assert answer.usage.completion_tokens == 1
    assert simulator.engine.metrics.finished["abort"] == 1


async def test_a_full_queue_is_503_and_says_when_to_come_back(start: Start, connect: Connect) -> None:
    simulator = await start("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--decode-base-ms", "50")
    api = connect(simulator)
    first = await chat(api, max_tokens=1000, stream=True)
    await anext(aiter(first))
    waiting = asyncio.create_task(chat(api, max_tokens=1))
    await until(lambda: bool(simulator.engine.scheduler.waiting))
    with pytest.raises(openai.InternalServerError) as error:
        await chat(api, max_tokens=1)
    assert error.value.status_code == 503
    assert error.value.response.headers["retry-after"] == "1"
    await first.close()
    assert (await waiting).usage.completion_tokens == 1
    assert simulator.engine.metrics.rejected == 1
    # What never got into the queue doesn't count as a request that ended.
    assert sum(simulator.engine.metrics.finished.values()) == 2


async def test_speed_is_what_was_asked_for(start: Start, connect: Connect) -> None:
    simulator = await start(
        "--decode-base-ms", "10", "--decode-per-sequence-us", "0", "--prefill-base-ms", "30"
    )
    api = connect(simulator)
    loop = asyncio.get_running_loop()
    began = loop.time()
    stream = await chat(api, max_tokens=21, stream=True)
    moments = [loop.time() async for chunk in stream if chunk.choices[0].delta.content]
    assert moments[0] - began >= 0.03
    assert moments[-1] - began >= 0.225  # and 20 steps of 10 ms, less the clock's grain
