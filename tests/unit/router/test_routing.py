"""A request finds its model, variant and engine; the engine gets it unchanged."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tests.unit.router.harness import Harness, answer_json, model, post


async def test_model_after_messages_reaches_its_engine_with_the_body_unchanged(router: Harness) -> None:
    engine = await router.engine("r1")
    await router.table(model(bf16=[engine]))
    body = (
        '{"messages": [{"role":"user","content":"\\"model\\": \\"x\\" ☃"}],  "model" : "m", "n":1}'.encode()
    )
    answer = await router.ask(
        post(body=body, headers={"x-custom": "kept", "connection": "x-hop", "x-hop": "1"})
    )
    assert answer.status == 200
    assert answer.json()["engine"] == "r1"
    assert answer.headers["x-modelfleet-model"] == "m"
    assert answer.headers["x-modelfleet-variant"] == "bf16"
    assert answer.headers["x-modelfleet-replica"] == "r1"
    assert "x-modelfleet-fallback" not in answer.headers
    received = engine.requests[0]
    assert received.body == body
    assert received.headers["x-custom"] == "kept"
    assert "x-hop" not in received.headers
    assert received.headers["x-request-id"] == answer.headers["x-request-id"]


async def test_request_id_of_the_client_is_kept(router: Harness) -> None:
    engine = await router.engine("r1")
    await router.table(model(bf16=[engine]))
    answer = await router.ask(post(headers={"x-request-id": "abc-1"}))
    assert answer.headers["x-request-id"] == "abc-1"
    assert engine.requests[0].headers["x-request-id"] == "abc-1"


async def test_named_variant_is_pinned_and_the_engine_gets_the_bare_name(router: Harness) -> None:
    one, two = await router.engine("one"), await router.engine("two")
    await router.table(model(weights={"bf16": 100, "awq": 0}, bf16=[one], awq=[two]))
    body = b'{"mod\\u0065l":"m:awq" , "messages":[{"model":"m:bf16"}],"x":"\\u2603"}'
    answer = await router.ask(post(body=body))
    assert answer.headers["x-modelfleet-variant"] == "awq"
    assert answer.headers["x-modelfleet-model"] == "m"
    assert two.requests[0].body == body.replace(b'"m:awq"', b'"m"')


async def test_variant_header_pins_too(router: Harness) -> None:
    one, two = await router.engine("one"), await router.engine("two")
    await router.table(model(weights={"bf16": 100, "awq": 0}, bf16=[one], awq=[two]))
    answer = await router.ask(post(headers={"x-modelfleet-variant": "awq"}))
    assert answer.json()["engine"] == "two"
    assert "x-modelfleet-variant" not in two.requests[0].headers
    answer = await router.ask(post(model="m:bf16", headers={"x-modelfleet-variant": "awq"}))
    assert answer.status == 400


async def test_unknown_names_are_404_with_the_names_that_exist(router: Harness) -> None:
    engine = await router.engine("r1")
    await router.table(model(bf16=[engine]), model("other", a=[engine]))
    answer = await router.ask(model="nope")
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert "m, other" in answer.error["message"]
    answer = await router.ask(model="m:nope")
    assert answer.status == 404
    assert answer.error["code"] == "variant_not_found"
    assert "bf16" in answer.error["message"]
    answer = await router.ask(post(path="/v1/messages", model="nope"))
    assert answer.status == 404
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "not_found_error"


async def test_a_model_whose_name_holds_a_colon_is_found_first(router: Harness) -> None:
    one, two = await router.engine("one"), await router.engine("two")
    await router.table(model("m", awq=[one]), model("m:awq", x=[two]))
    assert (await router.ask(model="m:awq")).json()["engine"] == "two"
    assert (await router.ask(model="m:awq:x")).json()["engine"] == "two"


async def test_adapters_are_models(router: Harness) -> None:
    one, two = await router.engine("one"), await router.engine("two")
    table = model("base", a=[one, two])
    table["variants"][0]["endpoints"][1]["adapters"] = ["lora-1"]
    await router.table(table)
    for _ in range(4):
        answer = await router.ask(model="lora-1")
        assert answer.json()["engine"] == "two"
        assert answer.headers["x-modelfleet-model"] == "lora-1"
    assert two.requests[0].json()["model"] == "lora-1"
    assert (await router.ask(model="lora-1:a")).status == 200
    assert two.requests[-1].json()["model"] == "lora-1"
    listed = (await router.ask(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")).json()["data"]
    assert {"base", "base:a", "lora-1"} <= {entry["id"] for entry in listed}
    assert next(entry for entry in listed if entry["id"] == "lora-1")["parent"] == "base"


async def test_weights_split_the_bare_name(router: Harness) -> None:
    one, two = await router.engine("one"), await router.engine("two")
    await router.table(model(weights={"bf16": 20, "awq": 80}, bf16=[one], awq=[two]))
    client = await router.client()
    seen: Counter[str] = Counter()
    for _ in range(400):
        client.send(post())
        seen[(await client.answer()).headers["x-modelfleet-variant"]] += 1
    # 400 draws at 0.2: mean 80, standard deviation 8; 5 of them never happen by chance.
    assert 40 <= seen["bf16"] <= 120


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'"m"',
        b'{"model": 5}',
        b'{"model": "m"',
        b'{"messages": []}',
        b'{"model": ""}',
        b'{"model": null}',
    ],
)
async def test_malformed_bodies_are_400(router: Harness, body: bytes) -> None:
    await router.table(model(bf16=[await router.engine("r1")]))
    client = await router.client()
    client.send(post(body=body))
    answer = await client.answer()
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    client.send(post())
    assert (await client.answer()).status == 200


async def test_audio_forms_name_their_model_in_a_field(router: Harness) -> None:
    engine = await router.engine("r1")
    await router.table(model("whisper", fp16=[engine]))
    audio = b'\x00\xff--xyz\r\nname="model"' * 10
    form = (
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n'
        b"Content-Type: audio/wav\r\n\r\n" + audio + b"\r\n"
        b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper:fp16\r\n--xyz--\r\n'
    )
    headers = {"content-type": 'multipart/form-data; boundary="xyz"'}
    answer = await router.ask(post("/v1/audio/transcriptions", body=form, headers=headers))
    assert answer.status == 200
    assert engine.requests[0].body == form.replace(b"whisper:fp16", b"whisper")
    answer = await router.ask(post("/v1/audio/translations", body=b"--xyz--\r\n", headers=headers))
    assert answer.status == 400


ENDPOINTS = (
    "/v1/completions /v1/embeddings /v1/responses /v1/messages /v1/rerank /v1/score "
    "/tokenize /detokenize /classify /pooling"
)


@pytest.mark.parametrize("path", ENDPOINTS.split())
async def test_every_engine_endpoint_is_relayed(router: Harness, path: str) -> None:
    engine = await router.engine("r1")
    await router.table(model(bf16=[engine]))
    assert (await router.ask(post(path + "?a=b"))).status == 200
    assert engine.requests[0].line == f"POST {path}?a=b HTTP/1.1"


async def test_paths_and_methods_that_do_not_exist(router: Harness) -> None:
    await router.table(model(bf16=[await router.engine("r1")]))
    assert (await router.ask(post("/v1/load_lora_adapter"))).status == 404
    answer = await router.ask(b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.status == 405
    assert "POST" in answer.headers["allow"]
    assert (await router.ask(post("/v1/models"))).status == 405


async def test_models_can_be_read_one_by_one(router: Harness) -> None:
    await router.table(model("org/m", bf16=[await router.engine("r1")]))
    answer = await router.ask(b"GET /v1/models/org/m HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.json()["id"] == "org/m"
    answer = await router.ask(b"GET /v1/models/org%2Fm:bf16 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.json()["id"] == "org/m:bf16"
    assert (await router.ask(b"GET /v1/models/x HTTP/1.1\r\nhost: x\r\n\r\n")).status == 404
    client = await router.client()
    client.send(b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" + post(model="org/m"))
    assert int((await client.answer(head_only=True)).headers["content-length"]) > 0
    assert (await client.answer()).status == 200


async def test_readiness_follows_the_table(router: Harness) -> None:
    probe = b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n"
    assert (await router.ask(probe)).status == 503
    await router.table()
    assert (await router.ask(probe)).status == 200
    assert (await router.ask(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200
    assert "no model is being served" in (await router.ask()).error["message"]


async def test_engine_path_prefix_and_large_bodies(router: Harness) -> None:
    engine = await router.engine("r1")
    table = model(bf16=[engine])
    table["variants"][0]["endpoints"][0]["url"] += "/base"
    await router.table(table)
    text = "x" * 3_000_000
    answer = await router.ask(messages=[{"role": "user", "content": text}])
    assert answer.status == 200
    assert engine.requests[0].line == "POST /base/v1/chat/completions HTTP/1.1"
    assert json.loads(engine.requests[0].body)["messages"][0]["content"] == text


async def test_keep_alive_reuses_connections_on_both_sides(router: Harness) -> None:
    engine = await router.engine("r1", answer_json)
    await router.table(model(bf16=[engine]))
    client = await router.client()
    for _ in range(5):
        client.send(post())
        assert (await client.answer()).status == 200
    assert engine.connections == 1
    client.send(post(headers={"connection": "close"}))
    assert (await client.answer()).headers["connection"] == "close"
    assert await client.closed()
