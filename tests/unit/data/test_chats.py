"""Prepared conversations: packing, padding and portions change no loss, and what was left out is told."""

import json

import numpy as np
import pytest
import torch

from dougong.core.errors import ConfigError, DataError
from dougong.data.batch import Batch
from dougong.data.chats import ChatData
from dougong.data.tokenizer import BytesConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.parallel.gradients import plain_gradients
from dougong.runtime.device import Runtime


def chat(asked, replied, **more):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": replied, **more}]}


@pytest.fixture
def prepare(tmp_path):
    def make(records, *, context=128, **settings):
        file = tmp_path / "chats.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        return ChatData(path=str(file), **settings).prepare(BytesConfig(), context=context, cache=tmp_path / "cache")
    return make


MANY = [chat(f"{i} + {i}?", f"{2 * i}" + "!" * (i % 7)) for i in range(60)]
SHORT = {"fractions": (1, 0, 0), "context": 160}


def gradients_of(model, batch, micro_rows):
    objective = CausalLMConfig().build()
    model.zero_grad(set_to_none=True)
    weight = objective.weight(batch)
    plain_gradients(model, objective, batch.split(micro_rows), weight, Runtime())
    return {name: p.grad.clone() for name, p in model.named_parameters()}, weight


@pytest.fixture(scope="module")
def model():
    made = Qwen3Config(vocab_size=264, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32,
                       context=512).build()
    made.initialise(0)
    return made.double()


def test_packing_padding_and_portions_change_no_gradient(prepare, model):
    model.compute_dtype = torch.float64
    packed = Batch(**{k: torch.cat([b[k] for b in prepare(MANY, **SHORT).batches("train", rows=7)])
                      for k in ("tokens", "targets", "weight", "segment")})
    alone = prepare(MANY, pack=False, **SHORT)
    apart, = alone.batches("train", rows=len(MANY))
    assert apart.rows == 60 and packed.rows < 30
    reference, weight = gradients_of(model, apart, 60)
    for batch, micro_rows in ((packed, packed.rows), (packed, 1), (packed, 3), (apart, 7)):
        found, same = gradients_of(model, batch, micro_rows)
        assert same == weight == sum(alone.facts["splits"][s]["trained_tokens"] for s in ("train",))
        for name, gradient in reference.items():
            # the loss is taken in float32
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


def test_conversations_in_a_row_do_not_see_each_other(prepare, model):
    batch = next(prepare(MANY, **SHORT).batches("train", rows=1))
    tokens, segment = batch["tokens"], batch["segment"]
    changed = torch.where(segment == 0, 5, tokens)
    with torch.no_grad():
        before, after = (model.hidden(x, segment_BT=segment) for x in (tokens, changed))
    others = segment != 0
    assert segment.max() >= 3
    torch.testing.assert_close(before[others], after[others], rtol=0, atol=0)
    assert not torch.equal(before[~others], after[~others])


def test_the_loader_is_one_global_order_and_goes_on_where_it_was(prepare):
    corpus = prepare(MANY)
    whole = corpus.loader("train", rows=4, seed=1)
    halves = [corpus.loader("train", rows=4, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(3):
        batch, parts = next(whole), [next(half) for half in halves]
        torch.testing.assert_close(batch["tokens"], torch.cat([part["tokens"] for part in parts]))
    again = corpus.loader("train", rows=4, seed=1)
    again.load_state_dict(whole.state_dict())
    torch.testing.assert_close(next(again)["targets"], next(whole)["targets"])
    assert all(name.startswith("chats.jsonl:") for row in whole.documents(0) for name in row)
    small = prepare(MANY[:9]).loader("train", rows=64, seed=0)     # a batch may be more than there is
    assert next(small).rows == 64


def test_a_second_preparation_reads_the_cache_and_new_files_are_read_anew(prepare, tmp_path):
    first = prepare(MANY)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    again = ChatData(path=str(tmp_path / "chats.jsonl")).prepare(BytesConfig(), context=128, cache=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert prepare(MANY[1:]).fingerprint != first.fingerprint


def test_duplicates_go_and_the_same_question_is_on_one_side(prepare):
    records = [chat(f"question {i // 2}", f"reply {i}") for i in range(200)] + [chat("question  0", "reply 0")]
    corpus = prepare(records)
    assert corpus.facts["duplicates"]["exact"]["documents"] == 1
    sides = {}
    for split in ("train", "validation", "test"):
        for one in corpus.conversations(split):
            sides.setdefault(one.messages[0]["content"], set()).add(split)
    assert len(sides) == 100 and all(len(found) == 1 for found in sides.values())
    assert {split for found in sides.values() for split in found} == {"train", "validation", "test"}


@pytest.mark.parametrize("other", ["why \n\nthe caf\u00e9?\n", "why the cafe\u0301?"], ids=["space", "composition"])
def test_white_space_and_composition_make_no_other_question(prepare, other):
    plain = [f"{i}: why the caf\u00e9?" for i in range(60)]
    same = [f"{i}: {other}" for i in range(60)]
    twice = prepare([chat(asked, "so") for asked in (*plain, *same)])
    assert twice.facts["duplicates"]["exact"]["documents"] == 60
    sides = {}
    for split in ("train", "validation", "test"):
        for one in prepare([chat(asked, f"reply {i}") for i, asked in enumerate([*plain, *same])]).conversations(split):
            sides.setdefault(one.messages[0]["content"].split(":")[0], []).append(split)
    assert len(sides) == 60 and all(a == b for a, b in sides.values()) and len({a for a, _ in sides.values()}) == 3


def test_half_a_surrogate_pair_is_counted(prepare):
    broken = [chat("half \ud83d", "reply"), chat("call", "", tool_calls=[
        {"function": {"name": "add", "arguments": "{\"a\": \"\\ud83d\"}"}}]), {**MANY[0], "answer": "\ud83d"}]
    strange = [{"messages": [{"role": "\ud83d", "content": "hi"}]}, {"\ud83d": 1}]
    corpus = prepare([*MANY, *broken, *strange])
    skipped = corpus.facts["skipped"]
    assert {reason: fact["count"] for reason, fact in skipped.items()} == {
        "lone surrogate": 3, "unknown role": 1, "record in no shape of a conversation": 1}
    assert "chats.jsonl:61 (after" in skipped["lone surrogate"]["examples"][0]
    assert r"\ud83d" in skipped["unknown role"]["examples"][0]


def test_few_conversations_still_hold_some_out(prepare):
    splits = prepare(MANY[:5]).facts["splits"]
    assert [splits[name]["documents"] for name in ("train", "validation", "test")] == [3, 1, 1]


LONG = {"messages": [*chat("a", "b" * 20)["messages"], *chat("c", "d" * 200)["messages"]]}


@pytest.mark.parametrize("overlong, tokens", [("cut", 129), ("turns", 0), ("drop", None), ("error", DataError)])
def test_conversations_longer_than_a_row(prepare, overlong, tokens):
    settings = {"overlong": overlong, "fractions": (1, 0, 0)}
    if tokens is DataError:
        with pytest.raises(DataError, match=r"chats.jsonl:2 has .* more than a row of 128"):
            prepare([MANY[0], LONG], **settings)
        return
    corpus = prepare([MANY[0], LONG], **settings)
    facts = corpus.facts
    assert facts["cut"] == (overlong != "drop")
    assert facts["splits"]["train"]["documents"] == (1 if overlong == "drop" else 2)
    if overlong == "drop":
        assert facts["skipped"]["longer than a row"]["count"] == 1
        return
    ids, weight = corpus.encoded(1)
    learned = corpus.tokenizer.decode(ids[weight > 0])
    assert learned.startswith("b" * 20) and (len(ids) == tokens if overlong == "cut" else learned == "b" * 20)


def test_conversations_that_were_cut_are_told_of_the_split_they_lie_in(prepare):
    corpus = prepare([*MANY, *(chat(f"question {i}", "d" * 200) for i in range(20))], fractions=(0.6, 0.2, 0.2))
    told = [corpus.facts["splits"][name]["packing"]["documents_cut"] for name in ("train", "validation", "test")]
    assert sum(told) == corpus.facts["cut"] == 20 and told[0] < 20
    long = corpus.length(np.arange(len(corpus._split))) == 128
    assert told == [int(long[corpus._split == split].sum()) for split in range(3)]


def test_nothing_to_learn_is_an_error_that_explains_the_mask(prepare):
    with pytest.raises(DataError, match=r"only what the assistant says.*train_on=assistant"):
        prepare([chat("hi", "hello", train=False)])
    with pytest.raises(DataError, match="holds no conversation that can be used"):
        prepare([{"text": "words"}])
    some = prepare([chat("hi", "hello", train=False), *MANY[:4]]).facts["skipped"]
    assert some["nothing to learn in it"]["count"] == 1


def test_path_and_sources_exclude_each_other():
    with pytest.raises(ConfigError, match="both given"):
        ChatData(path="x", sources=({"kind": "files", "path": "y"},))


def test_every_row_has_something_to_learn(prepare):
    for batch in prepare(MANY).batches("train", rows=1):
        assert batch["weight"].sum() > 0 and batch["weight"].isfinite().all()
