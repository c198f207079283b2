"""Whatever comes is answered with a clear 4xx in OpenAI's shape, and the server goes on."""

import asyncio
import json
import random
import threading

import pytest
from pydantic import ValidationError

from dougong.serve.bodies import ChatBody, CompletionBody, EmbeddingBody

PROMPT = {"prompt": "a", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TEXT, TALK = "/v1/completions", "/v1/chat/completions"


def refused(response, status=400, *, param=..., code=...):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(response.text) < 1000
    if param is not ...:
        assert error["param"] == param
    if code is not ...:
        assert error["code"] == code
    return error["message"]


@pytest.mark.parametrize("raw", [
    b"", b"{", b"null", b"[]", b"3", b'"text"', b"{'a': 1}", b'{"prompt": "a",}', b"\xff\xfe\x00",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
    b"[" * 100_000, b'{"prompt":' * 50_000, b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b'{"prompt": "a"} trailing', b"\x00" * 10])
def test_what_is_no_json(server, raw):
    refused(server.client.post(TEXT, content=raw, headers={"content-type": "application/json"}), code="invalid_json")


@pytest.mark.parametrize("field, value", [
    ("temperature", "hot"), ("temperature", -1), ("temperature", 1e300), ("temperature", True), ("top_p", -0.1),
    ("top_p", 1.5), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", "5"), ("max_tokens", -3),
    ("max_tokens", 10**400), ("max_tokens", 10**6), ("n", 0), ("n", 10**9), ("n", 17), ("seed", -2**64),
    ("seed", 2**70), ("stop", ""), ("stop", [""]), ("stop", 5), ("stop", ["a"] * 17), ("logprobs", 21),
    ("logprobs", True), ("presence_penalty", 3), ("logit_bias", {"a": 1}), ("logit_bias", {"99999": 1}),
    ("logit_bias", {"1": 1000}), ("logit_bias", {"-1": 1}), ("logit_bias", [1]), ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("truncation", "sideways"), ("top_k", 0), ("min_p", 2), ("repetition_penalty", 1e-45), ("prompt", 5),
    ("prompt", []), ("prompt", {}), ("prompt", [[]]), ("prompt", [1, "a"]), ("prompt", [-1]), ("prompt", [2**80]),
    ("prompt", [1.5]), ("model", 7), ("user", 7), ("response_format", {"type": "xml"}), ("response_format", "json"),
    ("response_format", {"type": "json_schema"}), ("response_format", {"type": "regex", "regex": "("}),
    ("response_format", {"type": "text", "regex": "a"}), ("response_format", {"type": "choice", "choice": []}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}),
    ("response_format", {"type": "grammar", "grammar": "start: nothing"}), ("top_k", 2**64),
    ("best_of", 3), ("echo", True), ("suffix", "end")])
def test_wrong_values_are_named(server, field, value):
    message = refused(server.post(TEXT, {**PROMPT, field: value}))
    error = server.post(TEXT, {**PROMPT, field: value}).json()["error"]
    assert field in message or field in str(error["param"]) or field == "n"


def test_a_huge_float_is_no_infinity(server):
    raw = b'{"prompt": "a", "temperature": 1e999}'
    refused(server.client.post(TEXT, content=raw, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path, body", [
    (TEXT, {"prompt": ["a"] * 17}), (TEXT, {"prompt": [[97]] * 17}), (TEXT, {"prompt": "a", "n": 17}),
    (TALK, {**CHAT, "n": 17}), ("/v1/embeddings", {"input": ["a"] * 65}), (TEXT, {"prompt": ["a"] * 2000})])
def test_texts_are_counted_before_they_are_encoded(server, monkeypatch, path, body):
    encoded, model = [], server.app.state.models["tiny"]
    monkeypatch.setattr(model, "encode", encoded.append)
    monkeypatch.setattr(model, "encode_chat", encoded.append)
    assert "at most" in refused(server.post(path, body))
    assert not encoded


@pytest.mark.parametrize("kind, body", [
    (CompletionBody, {"prompt": [-1] * 9000}), (CompletionBody, {"prompt": [[]] * 900}),
    (CompletionBody, {"prompt": ["a", *[1] * 900]}), (EmbeddingBody, {"input": [-1] * 9000}),
    (ChatBody, {"messages": [{"role": "user", "content": [0] * 9000}]})])
def test_the_first_wrong_item_of_a_list_is_enough(kind, body):
    """Else a body of 1 MiB, each of whose numbers is wrong, keeps everybody waiting for seconds."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() < 9


def test_a_token_outside_the_vocabulary(server):
    assert "9999" in refused(server.post(TEXT, {"prompt": [9999]}))
    assert "9999" in refused(server.post("/v1/embeddings", {"input": [9999]}))


@pytest.mark.parametrize("messages", [
    [], "hi", [5], [{}], [{"role": "user"}], [{"content": "a"}], [{"role": "wizard", "content": "a"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": "a", "name": 5}],
    [{"role": "tool", "content": "a"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": None}], [{"role": "assistant", "content": "a", "tool_calls": [{}]}]])
def test_wrong_messages(server, messages):
    refused(server.post(TALK, {**CHAT, "messages": messages}))


@pytest.mark.parametrize("field, value", [("functions", [{}]), ("function_call", {"name": "f"}),
                                          ("modalities", ["audio"]), ("store", True), ("reasoning_effort", "high")])
def test_what_cannot_be_done_is_refused_by_name(server, field, value):
    assert repr(field) in refused(server.post(TALK, {**CHAT, field: value}), param=field, code="unsupported_field")


def test_unknown_fields_are_not_ignored(server):
    assert "'temprature'" in refused(server.post(TEXT, {**PROMPT, "temprature": 1}), code="unknown_field",
                                     param="temprature")


def test_values_that_ask_for_nothing_are_taken(server):
    idle = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "user": "u", "top_p": 1, "stop": None,
            "presence_penalty": 0, "logit_bias": {}, "stream": False, "response_format": {"type": "text"}}
    assert server.post(TEXT, {**PROMPT, **idle, "temperature": 0}).status_code == 200
    assert server.post(TALK, {**CHAT, "tools": [], "store": False, "metadata": None, "n": 1}).status_code == 200


@pytest.mark.parametrize("more", [{"top_p": 0}, {"top_p": 0, "temperature": 0}, {"temperature": 1e-46},
                                  {"temperature": 1e-40}])
def test_what_leaves_the_likeliest_token_only_is_greedy(server, more):
    asked = {"prompt": "a", "max_tokens": 20, "seed": 3}
    greedy, told = (server.post(TEXT, {**asked, **held}) for held in ({"temperature": 0}, more))
    assert told.status_code == 200 and told.json()["choices"] == greedy.json()["choices"]


def test_a_seed_may_be_negative_and_is_told_as_it_came(server):
    one, same, other = (server.post(TEXT, {"prompt": "a", "max_tokens": 20, "seed": seed}).json()
                        for seed in (-1, -1, -2**63))
    assert one["seed"] == -1 and one["choices"] == same["choices"] != other["choices"]


def test_a_message_may_have_a_name(server):
    named = {"messages": [{"role": "user", "content": "a", "name": "Bob"}], "max_tokens": 1}
    assert server.post(TALK, named).status_code == 200


def test_what_has_no_effect_together_is_refused(server):
    refused(server.post(TEXT, {**PROMPT, "temperature": 0, "top_p": 0.5}))
    refused(server.post(TEXT, {**PROMPT, "temperature": 0, "n": 2}), param="n")
    refused(server.post(TALK, {**CHAT, "top_logprobs": 2}), param="top_logprobs")
    refused(server.post(TALK, {**CHAT, "max_completion_tokens": 2}), param="max_tokens")


def test_other_paths_methods_and_kinds(server):
    for path in ("/v2/completions", "/admin", "/..%2f..%2fetc/passwd", "/web/chat.js", "/docs", "/redoc"):
        refused(server.client.get(path), 404)
    refused(server.client.get(TEXT), 405)
    refused(server.client.delete("/v1/models"), 405)
    refused(server.client.post(TEXT, data={"prompt": "a"}), 415)
    refused(server.client.post(TEXT, content=b"{}", headers={"content-type": "text/plain"}), 415)


@pytest.mark.parametrize("body", [{}, {"input": "a", "messages": CHAT["messages"]}, {"input": 5}, {"messages": []}])
def test_tokenize_refuses(server, body):
    refused(server.post("/v1/tokenize", body))


def test_tokenize(server):
    told = server.post("/v1/tokenize", {"input": "a斗"}).json()
    assert told["tokens"] == [97, 230, 150, 151] and told["count"] == 4 and told["texts"][0] == "a"
    chat = server.post("/v1/tokenize", {"messages": CHAT["messages"]}).json()
    assert bytes(chat["tokens"][1:]) == b"User: a\nAssistant:" and chat["tokens"][0] == 256


def test_tokens_are_spelled_beside_the_event_loop(server, monkeypatch):
    model, threads = server.app.state.models["tiny"], []
    spell = model.spell

    async def here():
        return threading.get_ident()

    loop = asyncio.run_coroutine_threadsafe(here(), server.runner._loop).result()
    monkeypatch.setattr(model, "spell", lambda id: (threads.append(threading.get_ident()), spell(id))[1])
    told = server.post("/v1/tokenize", {"input": "abba" * 100}).json()
    assert told["texts"] == list("abba" * 100) and len(threads) == 2 and loop not in threads


@pytest.mark.parametrize("value", [[], "", [""], [[]], 5, [1, "a"], ["a"] * 65, "a" * 300])
def test_embeddings_refuse(server, value):
    refused(server.post("/v1/embeddings", {"input": value}))


def test_random_bodies_never_break_it(server):
    """Bodies grown from the fields' names and values of every kind: 2xx or 4xx, never anything else."""
    rng = random.Random(7)
    names = ["prompt", "messages", "max_tokens", "temperature", "n", "stop", "stream", "seed", "logit_bias", "model",
             "tools", "logprobs", "top_logprobs", "response_format", "input", "encoding_format", "x"]
    values = [None, True, 0, -1, 1, 2, 1.5, 1e308, 10**30, "", "a", "tiny", "\u0000", "斗" * 50, [], {}, ["a"], [1, 2],
              [[97]], {"type": "text"}, [{"role": "user", "content": "a"}], {"97": 1}]
    for _ in range(250):
        path = rng.choice([TEXT, TALK, "/v1/embeddings", "/v1/tokenize"])
        start = {"max_tokens": 2, **rng.choice([PROMPT, CHAT, {"input": "a"}, {}])}
        body = {**start, **{rng.choice(names): rng.choice(values) for _ in range(rng.randint(0, 3))}}
        response = server.post(path, body)
        assert 200 <= response.status_code < 500, (path, json.dumps(body), response.text)
        if response.status_code >= 400:
            refused(response, response.status_code)


def test_the_openapi_document_describes_the_bodies(server):
    document = server.client.get("/openapi.json").json()
    schema = document["paths"][TALK]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False and schema["required"] == ["messages"]
    assert schema["properties"]["messages"]["items"]["properties"]["role"]["enum"]
    assert "$ref" not in json.dumps(document["paths"][TALK]) and "429" in document["paths"][TALK]["post"]["responses"]
