"""The official client, unchanged, against the server; and the texts are the engine's own."""

import asyncio
import math

import openai
import pytest
from live_server import tiny_engine

from dougong.data.tokenizer import BytesConfig
from dougong.generate import SamplingConfig, generate


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def by_hand():
    engine, tokenizer = tiny_engine(), BytesConfig().build()
    return lambda prompt, **sampling: generate(engine, tokenizer, [prompt], SamplingConfig(**sampling))


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "seed": 3, "top_p": 0.9}])
def test_a_completion_is_what_the_library_writes(client, by_hand, sampling):
    reply = client.completions.create(model="tiny", prompt="hello", max_tokens=20, **sampling)
    expected = by_hand("hello", max_tokens=20, **sampling)[0]
    assert reply.choices[0].text == expected.text and expected.text
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (6, 20, 26)
    assert reply.object == "text_completion" and reply.model == "tiny"


def test_samples_and_prompts_are_numbered_prompt_by_prompt(client, by_hand):
    reply = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=12, n=2, seed=5)
    expected = [r.text for prompt in "ab" for r in by_hand(prompt, max_tokens=12, n=2, seed=5)]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3] and len(set(expected)) == 4


def test_token_ids_are_taken_as_they_are(client):
    of_text = client.completions.create(model="tiny", prompt="ab", max_tokens=8, temperature=0)
    of_ids = client.completions.create(model="tiny", prompt=[256, 97, 98], max_tokens=8, temperature=0)
    assert of_ids.choices[0].text == of_text.choices[0].text


def test_a_stream_adds_up_to_the_whole(client):
    asked = {"model": "tiny", "prompt": "斗拱", "max_tokens": 40, "seed": 2, "n": 2}
    whole = client.completions.create(**asked)
    texts, ends, usage = {0: "", 1: ""}, {}, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert [texts[0], texts[1]] == [choice.text for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def test_chat_and_its_stream(client):
    asked = {"model": "tiny", "messages": [{"role": "system", "content": "be brief"},
                                           {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
             "max_completion_tokens": 15, "seed": 4}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_reply_of_the_client_can_be_sent_back(client):
    first = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    again = client.chat.completions.create(model="tiny", max_tokens=4, messages=[
        {"role": "user", "content": "hi"}, first.choices[0].message, {"role": "user", "content": "go on"}])
    assert again.choices[0].finish_reason == "length"


def test_log_probabilities_of_completions(client, by_hand):
    reply = client.completions.create(model="tiny", prompt="x", max_tokens=10, temperature=0, logprobs=3)
    told, expected = reply.choices[0].logprobs, by_hand("x", max_tokens=10, temperature=0, logprobs=3)[0]
    assert told.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == 10
    assert all(max(rivals.values()) == pytest.approx(own, abs=1e-6)
               for rivals, own in zip(told.top_logprobs, told.token_logprobs))   # greedy takes the likeliest


def test_log_probabilities_of_chat_and_of_its_stream(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 1,
             "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    told = whole.logprobs.content
    assert len(told) == 12 and all(len(token.top_logprobs) == 2 and -50 < token.logprob <= 0 for token in told)
    text = bytes(byte for token in told for byte in token.bytes).decode("utf-8", "replace")
    assert text.lstrip() == whole.message.content   # the plain template drops blanks before the first character
    streamed = [token for chunk in client.chat.completions.create(**asked, stream=True)
                if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [(t.token, t.logprob) for t in streamed] == [(t.token, t.logprob) for t in told]


def test_a_stop_string_cuts_text_tokens_and_work(client, server):
    asked = {"model": "tiny", "prompt": "q", "max_tokens": 200, "seed": 8, "logprobs": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[20:23]
    cut = client.completions.create(**asked, stop=["never in there", stop]).choices[0]
    assert cut.text == whole[:whole.find(stop)] and cut.finish_reason == "stop"
    assert len(cut.logprobs.tokens) == len(cut.logprobs.text_offset)
    assert all(offset < len(cut.text) for offset in cut.logprobs.text_offset)
    server.idle()


def test_penalties_and_bias_reach_the_engine(client):
    asked = {"model": "tiny", "prompt": "z", "max_tokens": 12, "temperature": 0}
    forced = client.completions.create(**asked, logit_bias={"65": 100})
    assert forced.choices[0].text == "A" * 12
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, extra_body={"repetition_penalty": 50.0}).choices[0].text != plain
    varied = client.completions.create(**asked, logit_bias={"65": 20, "66": 20}, frequency_penalty=2.0)
    assert len(set(varied.choices[0].text)) > 1


@pytest.mark.parametrize("form", ["base64", "float"])
def test_embeddings(client, form):
    """Unit length, the same alone and beside others; the client asks for base64 unless told not to."""
    more = {} if form == "base64" else {"encoding_format": "float"}
    both = client.embeddings.create(model="tiny", input=["some words", "others"], **more)
    alone = client.embeddings.create(model="tiny", input="some words", **more)
    assert len(both.data) == 2 and len(both.data[0].embedding) == 32
    assert math.fsum(x * x for x in both.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert both.data[0].embedding == pytest.approx(alone.data[0].embedding, abs=1e-6)
    assert both.data[1].embedding != pytest.approx(alone.data[0].embedding, abs=1e-2)
    assert both.usage.prompt_tokens == 11 + 7


def test_embeddings_are_the_mean_of_the_last_hidden_states(client):
    import torch
    engine = tiny_engine()
    ids = [256, *b"mean"]
    with torch.inference_mode():
        mean = engine.model.hidden(torch.tensor([ids]))[0].mean(0)
    reply = client.embeddings.create(model="tiny", input="mean", encoding_format="float")
    assert reply.data[0].embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "dougong"
    assert "plain" in client.models.retrieve("tiny").model_extra["dougong"]["chat_template"]


def test_errors_arrive_as_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match=r"no model 'gpt-9'.*tiny"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 400)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="cannot spell tool calls"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], tools=[
            {"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_a_long_prompt_keeps_its_end_if_told_so(client):
    reply = client.completions.create(model="tiny", prompt="ab" * 400, max_tokens=20, temperature=0,
                                      extra_body={"truncation": "auto"})
    assert reply.usage.prompt_tokens == 256 - 20 and reply.usage.completion_tokens == 20


def test_many_at_once_write_what_each_writes_alone(server):
    async def together():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(client.completions.create(
                model="tiny", prompt=f"text {i}", max_tokens=10 + i, seed=i) for i in range(16)))

    replies = asyncio.run(together())
    for i, reply in enumerate(replies):
        alone = server.post("/v1/completions", {"prompt": f"text {i}", "max_tokens": 10 + i, "seed": i}).json()
        assert reply.choices[0].text == alone["choices"][0]["text"]


def test_without_a_seed_texts_differ_and_the_reply_names_the_seed(server):
    asked = {"prompt": "s", "max_tokens": 16}
    first, second = (server.post("/v1/completions", asked).json() for _ in range(2))
    assert first["choices"][0]["text"] != second["choices"][0]["text"]
    again = server.post("/v1/completions", {**asked, "seed": first["seed"]}).json()
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    timings = first["timings"]
    assert 0 < timings["first_token_ms"] <= timings["total_ms"] and timings["tokens_per_s"] > 0
