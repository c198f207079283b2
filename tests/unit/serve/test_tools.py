"""Tool calls: spelled as the model's template spells them, arguments always valid, in the official client's words."""

import json

import jsonschema
import openai
import pytest
from live_server import live, tiny_engine
from tokenizers import Tokenizer as Backend

from dougong.core.errors import ConfigError
from dougong.data.bpe import byte_alphabet, byte_level
from dougong.data.chat_template import ChatTemplate
from dougong.data.tokenizer import BytesConfig, Tokenizer
from dougong.serve.calls import CallReader
from dougong.serve.model import ServedModel
from dougong.serve.settings import ServeConfig
from dougong.serve.tools import spelling_of
from dougong.serve.writing import Piece

pytest.importorskip("llguidance")
HEAD = """\
{%- if tools %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ '\\n' }}
"""
TAIL = "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
TAGS = HEAD + """\
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n' if m.content or not loop.first }}<call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</call>
{%- endfor %}""" + TAIL
LIST = HEAD + """\
{%- if m.tool_calls %}<|calls|>[
{%- for call in m.tool_calls %}{"name": "{{ call.function.name }}", "parameters":{{ call.function.arguments | tojson }}}
{{- '' if loop.last else ', ' }}{% endfor %}]{% else %}{{ m.content }}{% endif %}""" + TAIL
TEXT = TAGS.replace("call.function.arguments | tojson", "call.function.arguments")
TAKES = {"type": "object", "properties": {
    "city": {"enum": ["Xi'an", "Ürümqi", "a \"quoted\" {place}"]},
    "days": {"type": "integer", "minimum": 1, "maximum": 9},
    "deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
             "additionalProperties": False}}, "required": ["city", "days", "deep"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "forecast", "parameters": TAKES}},
         {"type": "function", "function": {"name": "get_weather_now", "strict": True}}]
SCHEMAS = {"get_weather": TAKES, "get_weather_now": {"type": "object", "maxProperties": 0}}
END_SOON = {str(ord("]")): 8}    # the tiny model likes lists too much
TALK = [{"role": "user", "content": "hi"}]


def tokenizer():
    backend: Backend = byte_level({letter: i for i, letter in enumerate(byte_alphabet())}, [], None)
    backend.add_special_tokens(["<|endoftext|>", "<|end|>", "<|calls|>"])
    return Tokenizer(backend, document_id=backend.token_to_id("<|endoftext|>"))


def model(config, name, template):
    codec = tokenizer()
    return ServedModel(name, tiny_engine(vocab_size=codec.vocab_size, context=1024), codec, config, template=template)


@pytest.fixture(scope="module")
def running():
    config = ServeConfig(port=0)
    models = [model(config, "tags", TAGS), model(config, "list", LIST),
              ServedModel("base", tiny_engine(), BytesConfig().build(), config)]
    with live(config, models=models) as server:
        yield server


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def check(calls):
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.type == "function" and call.id.startswith("call_")
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["tags", "list"])
def test_required_calls_are_always_valid(client, name, seed):
    reply = client.chat.completions.create(model=name, messages=TALK, tools=TOOLS, tool_choice="required", seed=seed,
                                           n=3, max_tokens=800, logit_bias=END_SOON)
    for choice in reply.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert choice.message.tool_calls
        check(choice.message.tool_calls)


def test_a_named_function_is_called_once(client):
    reply = client.chat.completions.create(model="tags", messages=TALK, tools=TOOLS, seed=1, max_tokens=300, n=4,
                                           tool_choice={"type": "function", "function": {"name": "get_weather"}})
    for choice in reply.choices:
        assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
        check(choice.message.tool_calls)


def test_one_call_at_most_unless_parallel(client):
    reply = client.chat.completions.create(model="tags", messages=TALK, tools=TOOLS, tool_choice="required", n=8,
                                           parallel_tool_calls=False, max_tokens=300, seed=2)
    assert {len(choice.message.tool_calls) for choice in reply.choices} == {1}
    many = client.chat.completions.create(model="tags", messages=TALK, tools=TOOLS[1:], tool_choice="required", n=8,
                                          max_tokens=900, seed=2, logit_bias={str(ord("\n")): 8})
    assert max(len(choice.message.tool_calls) for choice in many.choices if choice.finish_reason == "tool_calls") > 1


@pytest.mark.parametrize("name", ["tags", "list"])
def test_a_stream_of_calls_adds_up_to_the_whole(client, name):
    asked = {"model": name, "messages": TALK, "tools": TOOLS, "tool_choice": "required", "seed": 3, "max_tokens": 800,
             "logit_bias": END_SOON}
    whole = client.chat.completions.create(**asked).choices[0]
    told, finish = {}, None
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        assert not choice.delta.content
        for delta in choice.delta.tool_calls or []:
            if delta.id:
                assert delta.type == "function" and delta.index == len(told)
                told[delta.index] = [delta.function.name, delta.function.arguments]
            else:
                told[delta.index][1] += delta.function.arguments
    assert finish == "tool_calls"
    assert list(told.values()) == [[c.function.name, c.function.arguments] for c in whole.message.tool_calls]


def test_the_clients_own_stream_helper_understands(client):
    with client.chat.completions.stream(model="tags", messages=TALK, tools=TOOLS, tool_choice="required", seed=5,
                                        max_tokens=500, parallel_tool_calls=False) as stream:
        for _ in stream:
            pass
        check(stream.get_final_completion().choices[0].message.tool_calls)


def test_auto_is_text_or_calls_and_never_half_of_one(client):
    """The mark is made likely, so both happen."""
    seen = set()
    for seed in range(6):
        bias = {str(ord("<")): 6} if seed % 2 else {}
        reply = client.chat.completions.create(model="tags", messages=TALK, tools=TOOLS, seed=seed, n=4,
                                               max_tokens=500, logit_bias={**bias, str(ord("c")): 3.0})
        for choice in reply.choices:
            assert "<call>" not in (choice.message.content or "")
            if choice.finish_reason == "tool_calls":
                check(choice.message.tool_calls)
            seen.add(choice.finish_reason)
    special = str(tokenizer().special_tokens["<|calls|>"])
    reply = client.chat.completions.create(model="list", messages=TALK, tools=TOOLS, seed=1, n=8, max_tokens=500,
                                           logit_bias={special: 4})
    for choice in reply.choices:
        assert "<|calls|>" not in (choice.message.content or "")
        if choice.message.tool_calls and choice.finish_reason != "length":
            check(choice.message.tool_calls)
            seen.add("tool_calls")
    assert "tool_calls" in seen


def test_none_calls_nothing_and_shows_no_tools(client, running):
    free = client.chat.completions.create(model="tags", messages=TALK, seed=1, max_tokens=20)
    none = client.chat.completions.create(model="tags", messages=TALK, seed=1, max_tokens=20, tools=TOOLS,
                                          tool_choice="none")
    assert none.choices[0].message.content == free.choices[0].message.content
    assert none.usage.prompt_tokens == free.usage.prompt_tokens


def test_results_go_back_into_the_template(client, running):
    first = client.chat.completions.create(model="tags", messages=TALK, tools=TOOLS, tool_choice="required", seed=1,
                                           parallel_tool_calls=False, max_tokens=300).choices[0].message
    call = first.tool_calls[0]
    talk = [*TALK, first, {"role": "tool", "tool_call_id": call.id, "name": call.function.name,
                           "content": "sunny <|end|>"}]
    again = client.chat.completions.create(model="tags", messages=talk, tools=TOOLS, max_tokens=3)
    assert again.usage.completion_tokens == 3
    turn = first.model_dump(exclude_none=True)
    ids = running.post("/v1/tokenize", {"model": "tags", "messages": [*TALK, turn, talk[-1]]}).json()["tokens"]
    end = tokenizer().special_tokens["<|end|>"]
    text = "".join(chr(id) if id < 256 else "¶" for id in ids)
    arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False).encode().decode("latin-1")
    assert ids.count(end) == 3
    spelled = f'{{"name": "{call.function.name}", "arguments": {arguments}}}'
    assert f"<call>\n{spelled}\n</call>¶[tool]\nsunny <|end|>¶" in text


@pytest.mark.parametrize("change, param", [
    ({"tools": [{}]}, "tools"), ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools"),
    ({"tools": TOOLS + TOOLS}, "tools"), ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "unheard"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "wat"}}}}}]}, "tools"),
    ({"messages": [*TALK, {"role": "tool", "tool_call_id": "made up", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "f", "arguments": "{}"}}]}]}, "messages"),
    ({"messages": [*TALK, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "f", "arguments": "[1"}}]}]}, "messages")])
def test_what_does_not_fit_is_refused_by_name(running, change, param):
    response = running.post("/v1/chat/completions", {"model": "tags", "messages": TALK, "max_tokens": 4, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and (error["param"] or "").startswith(param), error


def test_a_base_model_says_that_it_cannot(client):
    with pytest.raises(openai.BadRequestError, match=r"cannot spell tool calls.*base model"):
        client.chat.completions.create(model="base", messages=TALK, tools=TOOLS)
    assert [m.model_extra["dougong"]["tools"] for m in client.models.list()] == [True, True, False]


def test_spellings():
    tags = spelling_of(ChatTemplate(tokenizer(), TAGS))
    assert (tags.begin, tags.opening, tags.middle) == ("", '<call>\n{"name": "', '", "arguments": ')
    assert (tags.closing, tags.between, tags.end, tags.mark) == ("}\n</call>", "\n", "", "<call>")
    listed = spelling_of(ChatTemplate(tokenizer(), LIST))
    assert (listed.begin, listed.opening, listed.closing, listed.between, listed.end) == (
        "<|calls|>[", '{"name": "', "}", ", ", "]")
    assert listed.mark == "<|calls|>"
    assert spelling_of(ChatTemplate(tokenizer(), TEXT)).as_text and not tags.as_text


@pytest.mark.parametrize("source, why", [
    ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "does not show the tools|name and then its"),
    (TAGS.replace("{{ tool | tojson }}", ""), "does not show the tools"),
    (TAGS.replace('"name"', '"id": "{{ call.id }}", "name"'), "ids of calls"),
    (TAGS.replace("call.function.arguments | tojson", "call.function.arguments | length"), "JSON object"),
    (TAGS.replace("{{ '<|end|>' }}", "\n"), "no special token")])
def test_templates_that_cannot_spell_calls(source, why):
    with pytest.raises(ConfigError, match=f"cannot spell tool calls: .*({why})"):
        spelling_of(ChatTemplate(tokenizer(), source))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_read_however_the_text_is_cut(size):
    spelling = spelling_of(ChatTemplate(tokenizer(), TAGS))
    given = ['{"a": "}{\\"<call>", "b": [{"c": 1}]}', "{}"]
    text = "Well <c all>,\n" + "\n".join(
        f'<call>\n{{"name": "f{i}", "arguments": {one}}}\n</call>' for i, one in enumerate(given))
    reader, content, deltas = CallReader(spelling, free=True), "", []
    for at in range(0, len(text), size):
        piece = Piece(text[at:at + size], [], "stop" if at + size >= len(text) else None)
        reader.read(piece)
        content += piece.text
        deltas += piece.calls
    assert content == reader.content == "Well <c all>,"
    assert [(call.name, call.arguments) for call in reader.calls] == [("f0", given[0]), ("f1", given[1])]
    assert "".join(d["function"]["arguments"] for d in deltas if d["index"] == 0) == given[0]


def test_a_stop_string_ends_text_and_never_a_call():
    spelling = spelling_of(ChatTemplate(tokenizer(), TAGS))
    reader, piece = CallReader(spelling, free=True, stops=("END",)), Piece("a  END b", [])
    reader.read(piece)
    assert (piece.text, piece.stop, piece.finish) == ("a  ", "END", "stop")
    reader = CallReader(spelling, free=True, stops=("END",))
    reader.read(Piece('<call>\n{"name": "f", "arguments": {"END": 1}}\n</call>', [], "stop"))
    assert reader.calls[0].arguments == '{"END": 1}'
