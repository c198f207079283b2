"""`response_format`: replies that cannot be anything else, however little the model knows; and others go on."""

import json
import re

import openai
import pytest

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer",
          "minimum": 0, "maximum": 99}}, "required": ["name", "age"], "additionalProperties": False}
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server):
    pytest.importorskip("llguidance")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("seed", range(4))
def test_a_json_schema(client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    reply = client.chat.completions.create(model="tiny", messages=TALK, response_format=form, seed=seed, n=2,
                                           max_tokens=200)
    for choice in reply.choices:
        told = json.loads(choice.message.content)
        assert set(told) == {"name", "age"} and 0 <= told["age"] <= 99 and len(told["name"]) <= 6
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("form, fits", [
    ({"type": "regex", "regex": r"[0-9]{3}-[a-c]{2}"}, lambda text: re.fullmatch(r"[0-9]{3}-[a-c]{2}", text)),
    ({"type": "choice", "choice": ["yes", "no", "也许"]}, lambda text: text in ("yes", "no", "也许")),
    ({"type": "grammar", "grammar": 'start: "(" start ")" | "x"'}, lambda text: re.fullmatch(r"\(*x\)*", text)),
])
def test_other_forms_also_in_a_stream(client, form, fits):
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 60, "seed": 3, "extra_body": {"response_format": form}}
    whole = client.completions.create(**asked).choices[0]
    assert fits(whole.text) and whole.finish_reason == "stop"
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert streamed == whole.text


def test_a_broken_form_costs_its_own_client_alone(server, client):
    before = server.post("/v1/completions", {"prompt": "b", "max_tokens": 9, "seed": 1}).json()["choices"][0]["text"]
    for pattern in ("(", "a" * 4096, "(((a{1000}){1000}){1000})", "[z-a]", "(?<=a)b"):
        response = server.post("/v1/completions", {"prompt": "a", "max_tokens": 5, "response_format": {
            "type": "regex", "regex": pattern}})
        assert response.status_code in (200, 400), response.text
    nested = {}
    for _ in range(150):
        nested = {"type": "array", "items": nested}
    response = server.post("/v1/completions", {"prompt": "a", "max_tokens": 5, "response_format": {
        "type": "json_schema", "json_schema": {"name": "n", "schema": nested}}})
    assert response.status_code in (200, 400)
    after = server.post("/v1/completions", {"prompt": "b", "max_tokens": 9, "seed": 1}).json()["choices"][0]["text"]
    assert after == before and server.client.get("/ready").status_code == 200
