"""`response_format`: replies that cannot be anything else, however little the model knows; and others go on."""

import asyncio
import json
import re

import openai
import pytest
from live_server import tiny_engine
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers

from dougong.data.tokenizer import Tokenizer
from dougong.generate import Request, SamplingConfig, Scheduler
from dougong.generate.text import Detokenizer
from dougong.serve.bodies import ResponseFormat
from dougong.serve.model import ServedModel
from dougong.serve.settings import ServeConfig
from dougong.serve.structured import Structured

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


WORDS = ["</s>", "New", "York", "▁New", "▁York", "▁", *"NewYork", "Ne", "Yo", "Yor"]
MERGES = [("N", "e"), ("Ne", "w"), ("Y", "o"), ("Yo", "r"), ("Yor", "k"), ("▁", "New"), ("▁", "York")]


@pytest.fixture(scope="module")
def sentencepiece():
    """Made as those of Llama 2 and Mistral are: a blank before the text, ▁ for blanks, bytes for what is unknown."""
    words = list(dict.fromkeys([*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]))
    backend = HuggingFaceTokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=MERGES,
                                              byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, document_id=0)


def compiled(tokenizer, **form):
    pytest.importorskip("llguidance")
    return asyncio.run(Structured(tokenizer).compile(ResponseFormat(**form), tokenizer.document_id))


@pytest.mark.parametrize("form, fits", [
    ({"type": "choice", "choice": ["New York", "é 斗拱"]}, lambda text: text in ("New York", "é 斗拱")),
    ({"type": "regex", "regex": "[A-Za-z]{1,9}"}, lambda text: re.fullmatch("[A-Za-z]{1,9}", text)),
    ({"type": "regex", "regex": "(New|York| |é){2,9}x"}, lambda text: re.fullmatch("(New|York| |é){2,9}x", text)),
    ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": "x é"}}}},
     lambda text: json.loads(text) == {"a": "x é"})])
def test_forms_hold_for_a_tokenizer_that_drops_the_first_blank(sentencepiece, form, fits):
    constraint = compiled(sentencepiece, **form)
    scheduler, before = Scheduler(tiny_engine(vocab_size=sentencepiece.vocab_size)), [1]
    texts, ends = {}, {}
    for seed in range(8):
        row = scheduler.add(Request(before, SamplingConfig(max_tokens=60, seed=seed), frozenset({0}),
                                    constraint=constraint.copy()))
        texts[row] = (Detokenizer(sentencepiece, before), [])
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            detokenizer, written = texts[token.row]
            ends[token.row] = token.finish
            written.append("" if token.finish else detokenizer.push(token.id))
    for row, (detokenizer, written) in texts.items():
        text = "".join(written) + detokenizer.end()
        assert fits(text) and ends[row] == "stop", text


def test_what_it_has_read_after_other_words_is_what_it_may_write(sentencepiece):
    constraint = compiled(sentencepiece, type="choice", choice=["New York New"])
    ids = [sentencepiece.backend.token_to_id(word) for word in ("New", "▁York", "▁New")]
    for id in ids:
        assert constraint.allowed()[id]
        constraint.accept(id)


def test_tokens_are_told_with_their_blanks_and_bytes(sentencepiece):
    model = ServedModel("tiny", tiny_engine(vocab_size=sentencepiece.vocab_size), sentencepiece, ServeConfig(port=0))
    ids = sentencepiece.encode("New York é")
    assert b"".join(bytes(model.spell(id)[1]) for id in ids) == " New York é".encode()
    assert model.spell(4) == (" York", list(b" York")) and model.spell(0)[0] == "</s>"
