"""Every usual shape of a conversation is read, and what is none is named."""

import gzip
import json
import lzma
from datetime import date

import pytest

from dougong.data.chat_sources import ChatFiles, Found
from dougong.data.conversations import Conversation, conversation_of
from dougong.data.decode import NotText

ASKED, REPLIED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
SHAPES = {
    "messages": {"messages": [SYSTEM, ASKED, REPLIED]},
    "conversations": {"system": "Be kind.", "conversations": [{"from": "human", "value": "hi"},
                                                              {"from": "gpt", "value": "hello"}]},
    "instruction": {"system": "Be kind.", "instruction": "hi", "input": "", "output": "hello"},
    "prompt": {"prompt": [SYSTEM, ASKED], "completion": [REPLIED]},
    "question": {"system": "Be kind.", "question": "hi", "answer": "hello"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_conversation(shape):
    found, name = conversation_of(SHAPES[shape], id="a", source="s")
    assert name == shape and found == Conversation("a", "s", (SYSTEM, ASKED, REPLIED))
    assert Conversation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_an_input_stands_below_its_instruction():
    found, _ = conversation_of({"instruction": "Sort.", "input": "b a", "output": "a b"}, id="a", source="s")
    assert found.messages[0]["content"] == "Sort.\n\nb a"


def test_tools_and_calls_kept_as_text_are_read():
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {"tools": json.dumps(tools), "skill": "adding", "answer": 3, "messages": [
        ASKED, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "function": {"name": "add", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "1"}, REPLIED]}
    found, _ = conversation_of(record, id="a", source="s")
    assert found.tools == tuple(tools) and (found.skill, found.answer) == ("adding", "3")
    assert found.messages[1]["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert found.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "1"}
    hermes = {"conversations": [{"from": "human", "value": "hi"},
                                {"from": "function_call", "value": "{\"name\": \"add\", \"arguments\": {\"a\": 1}}"},
                                {"from": "observation", "value": "3"}, {"from": "gpt", "value": "hello"}]}
    assert conversation_of(hermes, id="a", source="s")[0].messages[1]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize("messages, reason, where", [
    ([REPLIED], "roles out of order", "message 1 is assistant at the start"),
    ([ASKED, ASKED, REPLIED], "roles out of order", "message 2 is user after user"),
    ([ASKED, SYSTEM, REPLIED], "roles out of order", "message 2 is system after user"),
    ([ASKED, {"role": "tool", "content": "3"}], "roles out of order", "message 2 is tool after user"),
    ([ASKED, {"role": "assistant", "content": " \n"}], "empty assistant turn", "message 2"),
    ([ASKED], "conversation without a reply", "1 messages"),
    ([ASKED, {"role": "narrator", "content": "x"}], "unknown role", "narrator"),
    ([{"role": "user", "content": [{"type": "image"}]}, REPLIED], "content that is no text", "images"),
    (["hi"], "message that is not an object", "str"),
    ([ASKED, {**REPLIED, "tool_calls": 5}], "tool calls that are no list", "int"),
    ([ASKED, {"role": "assistant", "content": "half \ud83d"}], "lone surrogate", "half "),
    ([ASKED, {**REPLIED, "tool_calls": [{"name": "at", "arguments": {"day": date(2024, 7, 26)}}]}],
     "value that is not JSON", "date"),
])
def test_what_is_no_conversation_is_named(messages, reason, where):
    with pytest.raises(NotText) as problem:
        conversation_of({"messages": messages}, id="a", source="s")
    assert problem.value.reason == reason and where in problem.value.where


@pytest.mark.parametrize("wrong", [{"input": 5}, {"input": ["a", "b"]}, {"instruction": ["a"]}, {"output": 5}])
def test_an_instruction_that_is_no_text_is_named(wrong):
    with pytest.raises(NotText, match="content that is no text"):
        conversation_of({"instruction": "Sort.", "input": "b a", "output": "a b", **wrong}, id="a", source="s")


def test_tools_nested_too_deeply_are_no_tools():
    with pytest.raises(NotText, match="tools that are no list"):
        conversation_of({**SHAPES["messages"], "tools": "[" * 100_000}, id="a", source="s")


def test_damaged_files_and_values_nested_too_deeply_are_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole, deep = json.dumps([SHAPES["messages"]] * 500).encode(), "[" * 100_000
    for suffix, packed in ((".gz", gzip.compress(whole)), (".xz", lzma.compress(whole)),
                           (".zst", zstandard.ZstdCompressor().compress(whole))):
        (tmp_path / f"a.json{suffix}").write_bytes(packed[:20] + b"damage" + packed[26:])
        (tmp_path / f"b.json{suffix}").write_bytes(b"not compressed at all")
    (tmp_path / "deep.json").write_text(deep)
    less = json.loads("[" * 600 + "]" * 600)       # json takes it, what follows does not
    lines = [SHAPES["messages"], {"messages": [ASKED, {**REPLIED, "tool_calls": [{"name": "at", "arguments": less}]}]}]
    (tmp_path / "deep.jsonl").write_text("\n".join([deep, *map(json.dumps, lines)]))
    found = Found()
    assert [one.id for one in ChatFiles(path=str(tmp_path)).stream(found)] == ["deep.jsonl:2"]
    assert {reason: fact["count"] for reason, fact in found.facts().items()} == {
        "damaged compressed file": 6, "broken JSON file": 1, "broken JSON line": 1, "value nested too deeply": 1}


def test_files_of_all_kinds_with_what_each_held(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    lines = [*(json.dumps(SHAPES[shape]) for shape in ("messages", "question")), "{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(json.dumps([SHAPES["conversations"], {"text": "no"}]))
    (tmp_path / "c.json").write_text(json.dumps(SHAPES["prompt"]) + "\n" + json.dumps(SHAPES["prompt"]))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(SHAPES["instruction"]).encode()))
    parquet.write_table(Table.from_pylist([SHAPES["messages"]]), tmp_path / "e.parquet")
    (tmp_path / "readme.md").write_text("words")
    found = Found()
    read = list(ChatFiles(path=str(tmp_path)).stream(found))
    assert [one.id for one in read] == ["a.jsonl:1", "a.jsonl:2", "b.json:1", "c.json:1", "c.json:2", "d.jsonl.gz:1",
                                        "e.parquet:1"]
    assert all(one.messages == (SYSTEM, ASKED, REPLIED) for one in read)
    assert found.shapes == {"a.jsonl": {"messages": 1, "question": 1}, "b.json": {"conversations": 1},
                            "c.json": {"prompt": 2}, "d.jsonl.gz": {"instruction": 1}, "e.parquet": {"messages": 1}}
    assert {reason: fact["count"] for reason, fact in found.facts().items()} == {
        "broken JSON line": 1, "record in no shape of a conversation": 1, "not a .jsonl, .json or .parquet file": 1}


def test_a_saved_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    from dougong.data.chats import ChatData

    datasets.Dataset.from_list([SHAPES["messages"]]).save_to_disk(tmp_path / "saved")
    source, = ChatData(path=str(tmp_path / "saved")).resolved_sources()
    assert [one.messages for one in source.stream(Found())] == [(SYSTEM, ASKED, REPLIED)]
