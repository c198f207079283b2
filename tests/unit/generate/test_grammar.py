import builtins
import json
import random
import re

import jsonschema
import pytest
from tiny_models import build

from dougong.core.errors import ConfigError, MissingExtraError
from dougong.data.bpe import DOCUMENT_TOKEN, add_special_tokens, train_bpe
from dougong.data.documents import Document
from dougong.data.tokenizer import CharactersConfig, Tokenizer
from dougong.generate import Engine, Request, SamplingConfig, Scheduler

pytest.importorskip("llguidance")
from dougong.generate.grammar import Grammars

STOP = 256
PIECES = [bytes([byte]) for byte in range(256)] + [b"<stop>"]
BYTES = lambda text: list(text.encode())   # noqa: E731
PIECES += [b'":', b'{"', b"true", b"null", b', "', "斗拱".encode(), "é".encode()[:1], b"12"]


@pytest.fixture(scope="module")
def grammars():
    return Grammars(PIECES, BYTES, stop_id=STOP)


@pytest.fixture(scope="module")
def engine():
    model = build("qwen3", vocab_size=len(PIECES) + 3, context=512, num_layers=1)   # 3 places hold no token
    for parameter in model.parameters():    # nearly indifferent: a text goes wherever it may
        parameter.data.mul_(0.3)
    return Engine(model)


def replies(engine, constraints, **options):
    """What a random model writes under each constraint, and why it ended."""
    scheduler, texts, finish = Scheduler(engine, max_rows=16), {}, {}
    for i, constraint in enumerate(constraints):
        sampling = SamplingConfig(max_tokens=400, seed=i)
        request = Request([STOP, i % 256], sampling, frozenset({STOP}), constraint=constraint, **options)
        texts[scheduler.add(request)] = b""
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            finish[token.row] = token.finish
            texts[token.row] += b"" if token.finish else PIECES[token.id]
    return [(text.decode(), finish[id]) for id, text in texts.items()]


def random_schema(chance, depth=0):
    """A schema whose values are short, as a random model would never end a string by itself."""
    kind = chance.choice(["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
                         + ["object", "array", "anyOf"] * (depth < 2))
    name = lambda: "".join(chance.choice("abcde é\"\\斗") for _ in range(chance.randint(1, 5)))   # noqa: E731
    if kind == "string":
        return {"type": "string", "minLength": chance.randint(0, 2), "maxLength": chance.randint(2, 6)}
    if kind == "integer":
        low = chance.randint(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 2000)}
    if kind == "number":
        return {"type": "number", "exclusiveMinimum": -3, "maximum": chance.choice([0.5, 7, 100])}
    if kind == "enum":
        return {"enum": [name(), chance.randint(0, 99), None, [1, name()], {"k": True}][:chance.randint(1, 5)]}
    if kind == "const":
        return {"const": {name(): [chance.randint(0, 9)]}}
    if kind == "pattern":
        return {"type": "string", "pattern": chance.choice(["^[a-c]{2,4}$", r"^\d{3}-\d{2}$", "^(yes|no)!?$"])}
    if kind == "format":
        return {"type": "string", "format": chance.choice(["date", "uuid", "ipv4"])}
    if kind == "object":
        properties = {name(): random_schema(chance, depth + 1) for _ in range(chance.randint(1, 3))}
        required = [key for key in properties if chance.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(chance, depth + 1), "minItems": chance.randint(0, 2),
                "maxItems": chance.randint(2, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(chance, depth + 1) for _ in range(2)]}
    return {"type": kind}


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_all_replies_to_random_schemas_are_valid(engine, grammars, count):
    chance = random.Random(0)
    schemas = [random_schema(chance) for _ in range(count)]
    valid = 0
    written = replies(engine, [grammars.json_schema(schema) for schema in schemas])
    for schema, (text, finish) in zip(schemas, written):
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        valid += finish == "stop" and checker.is_valid(json.loads(text))
    assert valid == count and len({text for text, _ in written}) > 100


def test_guesses_follow_the_schema_too(engine, grammars):
    schema = {"type": "array", "items": {"enum": ["abcabc", "bcabca"]}, "minItems": 6, "maxItems": 9}
    constraints = [grammars.json_schema(schema) for _ in range(6)]
    plain = replies(engine, [constraint.copy() for constraint in constraints])
    assert replies(engine, constraints, speculate=4) == plain
    assert all(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)) for text, _ in plain)


def test_choices_patterns_and_grammars_hold(engine, grammars):
    options = ["yes", "no", 'a "quoted"\nline', "斗拱"]
    written = replies(engine, [grammars.choice(options) for _ in range(12)])
    assert {text for text, _ in written} <= set(options) and len({text for text, _ in written}) > 1
    written = replies(engine, [grammars.regex(r"[a-f]{3}(-\d{2}){1,3}") for _ in range(6)])
    assert all(re.fullmatch(r"[a-f]{3}(-\d{2}){1,3}", text) and finish == "stop" for text, finish in written)
    [(text, _)] = replies(engine, [grammars.lark('start: "(" start ")" | "x"')])
    assert re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")")


@pytest.mark.parametrize("schema", [
    {"type": "objekt"}, {"type": 3}, "{", "[1]", {"$ref": "#/nowhere"}, {"type": "string", "pattern": "(a"},
    {"not": {}}, {"type": "string", "format": "horoscope"}, {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"type": {1, 2}}])
def test_a_malformed_schema_is_refused_before_anything_runs(grammars, schema):
    with pytest.raises(ConfigError, match="JSON schema"):
        grammars.json_schema(schema)


def test_malformed_patterns_choices_and_grammars_are_refused(grammars):
    for refused in (lambda: grammars.regex("(a"), lambda: grammars.regex("(?=x)y"), lambda: grammars.choice([]),
                    lambda: grammars.choice(["a", ""]), lambda: grammars.lark("start: nothing"),
                    lambda: grammars.lark("((")):
        with pytest.raises(ConfigError):
            refused()


def test_a_pattern_that_explodes_costs_its_own_reply_at_most(engine, grammars):
    """Either refused at once, or its row ends with an error; the neighbour writes on."""
    try:
        explosive = grammars.regex("(" * 40 + "a|b|ab" + "){1,50}" * 40)
    except ConfigError:
        return
    scheduler = Scheduler(engine)
    sampling = SamplingConfig(max_tokens=20)
    scheduler.add(Request([1], sampling, frozenset({STOP}), constraint=explosive))
    other, tokens = scheduler.add(Request([1], sampling)), []
    while scheduler.running or scheduler.waiting:
        tokens += [token for token in scheduler.step() if token.row == other]
    assert len(tokens) == 20 and tokens[-1].finish == "length"


def read(tokenizer):
    return Grammars(tokenizer.pieces, tokenizer.encode, stop_id=tokenizer.document_id,
                    special_ids=sorted(tokenizer.special_tokens.values()))


def follow(grammar, ids, stop):
    """Every one of these tokens may come in its turn, and then the end."""
    for id in ids:
        assert grammar.allowed()[id], id
        grammar.accept(int(id))
    assert grammar.allowed()[stop]


TOOL_TEXT = '{"name": "temperature", "arguments": {"city": "New York"}}'


@pytest.fixture(scope="module")
def bpe():
    texts = ['{"temperature": 20, "city": "New York"}', TOOL_TEXT, "the temperature and the city of New York"] * 40
    backend = train_bpe(texts, vocab_size=304, pre_tokenizer="qwen2", reserved=0)
    add_special_tokens(backend, ["<|call|>"])
    return Tokenizer(backend, document_id=backend.token_to_id(DOCUMENT_TOKEN))


def test_a_text_may_be_written_in_the_tokens_that_the_model_has_read_it_in(bpe):
    made, stop, call = read(bpe), bpe.document_id, bpe.special_tokens["<|call|>"]
    properties = {"temperature": {"type": "integer"}, "city": {"enum": ["New York", "Paris"]}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    text = '{"temperature": 20, "city": "New York"}'
    assert any(bpe.pieces[id] == b"temperature" for id in bpe.encode(text))
    follow(made.json_schema(schema), bpe.encode(text), stop)
    follow(made.choice(["temperature of the city", "New York"]), bpe.encode("temperature of the city"), stop)
    arguments = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    lark = ('%llguidance {}\nstart: <[' + str(call) + ']> "{\\"name\\": \\"" named "}"\n'
            'named: "temperature\\", \\"arguments\\": " arguments | "terminal\\", \\"arguments\\": " arguments\n'
            "arguments: %json " + json.dumps({"x-guidance": {"whitespace_pattern": r"[\x20\x0A]"}, **arguments}))
    follow(made.lark(lark), [call, *bpe.encode(TOOL_TEXT)], stop)


def test_a_character_that_no_bytes_spell_is_written_whole_or_not_at_all():
    """Tokens of several bytes each, and no other way to spell them."""
    tokenizer = CharactersConfig(unknown="refuse").build([Document("0", "here", "ab斗拱")])
    made, stop = read(tokenizer), tokenizer.document_id
    follow(made.regex("a斗拱b"), tokenizer.encode("a斗拱b"), stop)
    follow(made.choice(["斗", "é"]), tokenizer.encode("斗"), stop)
    with pytest.raises(ValueError, match="cannot go on"):
        made.regex("é").allowed()


def test_a_token_against_the_rules_is_an_error(grammars):
    constraint = grammars.choice(["ab"])
    constraint.accept(ord("a"))
    with pytest.raises(ValueError):
        constraint.accept(ord("c"))


def test_the_missing_package_is_named(monkeypatch):
    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: found("nothing_of_this_name" if name == "llguidance"
                                                                          else name, *rest))
    with pytest.raises(MissingExtraError, match=r"dougong\[serve\]"):
        Grammars(PIECES, BYTES, stop_id=STOP)
