"""Judged replies: which records are read, what is left out and counted, and what a batch holds."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from dougong.core.errors import ConfigError, DataError
from dougong.data.decode import NotText
from dougong.data.inspect import look, render
from dougong.data.judgements import judged_of
from dougong.data.labelled import LabelledData
from dougong.data.preferences import PreferenceData
from dougong.data.tokenizer import BytesConfig

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
NO = {"role": "assistant", "content": "go away"}


def judged(**record):
    return judged_of(record, id="r", source="tests")


@pytest.mark.parametrize("record", [
    {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
    {"prompt": [USER], "chosen": [SAID], "rejected": [NO]},
    {"prompt": [USER], "chosen": "hello", "rejected": [NO]},
    {"chosen": [USER, SAID], "rejected": [USER, NO]},
    {"prompt": "hi", "chosen": [USER, SAID], "rejected": [USER, NO]},
    {"chosen": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
     "rejected": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "go away"}]}])
def test_every_shape_of_a_pair_is_the_same_pair(record):
    found = judged(**record)
    assert [list(side.messages) for side in found.sides] == [[USER, SAID], [USER, NO]]
    assert found.shared == 1 and found.label is None and found.asked == ["hi"]


def test_earlier_replies_of_the_prompt_are_not_learned():
    talk = [USER, SAID, {"role": "user", "content": "and?"}]
    found = judged(prompt=talk, chosen="yes", rejected="no")
    assert [message.get("train") for message in found.sides[0].messages] == [None, False, None, None]
    assert found.shared == 3


def test_singles_and_pairs_taken_apart():
    assert judged(prompt="hi", completion="hello", label=True).label == 1
    good, bad = judged(prompt="hi", chosen="hello", rejected="go away").apart()
    assert (good.label, good.sides[0].messages[-1]) == (1, SAID)
    assert (bad.label, bad.sides[0].messages[-1], bad.shared) == (0, NO, 1)


@pytest.mark.parametrize("record,why", [
    ({"prompt": "hi", "chosen": "same", "rejected": "same"}, "both replies are the same"),
    ({"prompt": "hi", "chosen": "yes", "rejected": "  "}, "empty assistant turn"),
    ({"chosen": "yes", "rejected": "no"}, "reply without a prompt"),
    ({"chosen": [USER, SAID], "rejected": [{"role": "user", "content": "hm"}, NO]}, "different prompts"),
    ({"prompt": "hi", "completion": "yes", "label": 0.3}, "neither true nor false"),
    ({"prompt": "hi", "completion": "yes"}, "without a judgement"),
    ({"chosen": [USER], "rejected": [USER, NO]}, "conversation without a reply")])
def test_what_is_no_judgement_says_why(record, why):
    with pytest.raises(NotText) as error:
        judged(**record)
    assert why in error.value.reason


def corpus(tmp_path, records, *, context=64, **settings):
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PreferenceData(path=str(path), **settings).prepare(BytesConfig(), context=context, cache=tmp_path / "cache")


def pairs(count=40):
    return [{"prompt": f"q{i:02d}", "chosen": f"yes {i}", "rejected": "no" * (1 + i % 3)} for i in range(count)]


def parts(made, number, side=0):
    """What was asked and what was said, of a record without turns."""
    ids, weight = made.encoded(number, side)
    return made.tokenizer.decode(ids[weight == 0]), made.tokenizer.decode(ids[weight > 0])


def test_a_batch_holds_both_replies_with_weight_on_the_reply_and_its_end_alone(tmp_path):
    made = corpus(tmp_path, pairs(), spelling="text", fractions=(1, 0, 0))
    tokenizer = made.tokenizer
    seen = set()
    for batch in made.batches("train", rows=8):
        assert batch["tokens"].shape == batch["targets"].shape == batch["weight"].shape
        assert batch["tokens"].shape[1] == 2
        assert batch["tokens"].shape[2] % 8 == 0
        for tokens, targets, weight in zip(*(batch[name] for name in ("tokens", "targets", "weight"))):
            said = [tokenizer.decode(targets[side][weight[side] > 0].tolist()) for side in (0, 1)]
            ends = [int(targets[side][weight[side] > 0][-1]) for side in (0, 1)]
            asked = [tokenizer.decode(tokens[side][:int(weight[side].nonzero()[0]) + 1].tolist()) for side in (0, 1)]
            assert said[0].startswith("yes ") and set(said[1]) == {"n", "o"} and ends == [tokenizer.document_id] * 2
            assert asked[0] == asked[1] and asked[0][1:] == f"{int(said[0][4:]):02d}"
            seen.add(said[0])
    assert len(seen) == 40


def test_the_chat_spelling_is_that_of_a_conversation(tmp_path):
    from dougong.data.turns import encode_turns, template_for_training

    made = corpus(tmp_path, pairs(), fractions=(1, 0, 0))
    template = template_for_training(made.tokenizer)
    ids, weight = made.encoded(3, 1)
    expected = encode_turns(judged(**pairs()[3]).sides[1], template)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(weight, expected[1])


def test_what_is_left_out_is_counted_with_its_reason(tmp_path):
    bad = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "", "rejected": "a"}, pairs()[0],
           {"prompt": "p", "chosen": "x" * 200, "rejected": "a"}, {"prompt": "p" * 200, "chosen": "a", "rejected": "b"}]
    made = corpus(tmp_path, [*pairs(), *bad], spelling="text", fractions=(1, 0, 0))
    counts = {reason: fact["count"] for reason, fact in made.facts["skipped"].items()}
    assert counts == {"both replies are the same": 1, "empty assistant turn": 1, "longer than a row": 2}
    assert made.facts["duplicates"]["exact"]["documents"] == 1
    cut = corpus(tmp_path, [*pairs(), *bad], spelling="text", fractions=(1, 0, 0), overlong="cut")
    assert len(cut) == 41 and cut.facts["cut"] == 1     # of the other one nothing is left to learn
    assert cut.facts["skipped"]["nothing of a reply within a row"]["count"] == 1
    assert max(batch["tokens"].shape[2] for batch in cut.batches("train", rows=50)) == 64


def test_what_was_cut_is_told_of_the_split_it_lies_in(tmp_path):
    records = [{**one, "chosen": "x" * (21 + 4 * i)} for i, one in enumerate(pairs())]
    made = corpus(tmp_path, records, spelling="text", fractions=(0.6, 0.2, 0.2), overlong="cut")
    told = [made.facts["splits"][name]["packing"]["documents_cut"] for name in ("train", "validation", "test")]
    cut = np.array([len(made.encoded(number, 0)[0]) == 65 for number in range(40)])
    assert told == [int(cut[made._split == split].sum()) for split in range(3)]
    assert sum(told) == made.facts["cut"] and told[0] < sum(told)
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "a" * 50, "label": i % 2}) + "\n" for i in range(40)))
    made = LabelledData(path=str(path), fractions=(0.6, 0.2, 0.2)).prepare(BytesConfig(), context=20, cache=tmp_path)
    splits = made.facts["splits"]
    assert all(facts["packing"]["documents_cut"] == facts["documents"] > 0 for facts in splits.values())


@pytest.mark.parametrize("settings", [{}, {"unpair": True}, {"overlong": "cut"}])
def test_bytes_are_those_that_the_tokens_of_a_reply_spell(tmp_path, settings):
    made = corpus(tmp_path, [*pairs(), {"prompt": "p", "chosen": "x" * 200, "rejected": "a"}], spelling="text",
                  fractions=(1, 0, 0), **settings)
    seen = look(made, documents=100)
    assert len(seen["documents"]) == 2 * len(made)
    for shown in seen["documents"]:
        assert shown["bytes"] == sum(not piece["special"] for piece in shown["pieces"])
        assert shown["tokens"] - 2 <= shown["bytes"] <= shown["tokens"]
    train = seen["facts"]["splits"]["train"]
    assert train["bytes"] == sum(shown["bytes"] for shown in seen["documents"]) and 0.7 < train["bytes_per_token"] < 1


def test_what_is_learned_of_a_pair_can_be_looked_at(tmp_path):
    seen = look(corpus(tmp_path, pairs(), fractions=(1, 0, 0)), documents=2)
    assert [shown["source"] for shown in seen["documents"]] == ["preferred", "rejected"] * 2
    learned = "".join(piece["text"] for piece in seen["documents"][0]["pieces"] if piece["weight"])
    assert learned == "yes 0<|im_end|>"
    out = io.StringIO()
    render(seen, Console(file=out, width=120))
    assert "tokens are learned" in out.getvalue()


def test_prompts_stay_on_one_side_and_few_records_still_fill_every_split(tmp_path):
    twice = [{"prompt": f"q{i}", "chosen": f"a{j}", "rejected": "b"} for i in range(30) for j in range(2)]
    made = corpus(tmp_path, twice, spelling="text", fractions=(0.6, 0.2, 0.2))
    sides = {}
    for number, split in enumerate(made._split):
        sides.setdefault(parts(made, number)[0], set()).add(int(split))
    assert all(len(found) == 1 for found in sides.values()) and set().union(*sides.values()) == {0, 1, 2}
    few = corpus(tmp_path, pairs(6), spelling="text", fractions=(0.9, 0.05, 0.05))
    assert all(few.facts["splits"][split]["rows"] for split in ("train", "validation", "test"))


def test_beside_a_single_reply_stands_that_of_another_to_the_same_prompt(tmp_path):
    made = corpus(tmp_path, pairs(10), spelling="text", fractions=(1, 0, 0), unpair=True)
    assert made.shape == "singles" and len(made) == 20
    batch = next(made.batches("train", rows=20))
    assert sorted(batch["label"].tolist()) == [0.0] * 10 + [1.0] * 10
    for tokens, weight in zip(batch["tokens"], batch["weight"]):
        begins = [int(side.nonzero()[0]) for side in weight]
        assert begins[0] == begins[1] and torch.equal(tokens[0][:begins[0]], tokens[1][:begins[0]])
    said = [[targets[weight > 0].tolist() for targets, weight in zip(row, weights)]
            for row, weights in zip(batch["targets"], batch["weight"])]
    assert sorted(own for own, _ in said) == sorted(other for _, other in said)


APART = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]


@pytest.mark.parametrize("records, settings", [
    (APART, {"unpair": True}),
    (APART[:6], {"unpair": True, "fractions": (0.9, 0.05, 0.05)}),
    ([{"prompt": f"q{int(i ** 0.5)}", "completion": f"{i}", "label": i % 2} for i in range(60)], {})])
def test_the_reply_beside_a_single_one_was_given_to_another_prompt(tmp_path, records, settings):
    made = corpus(tmp_path, records, spelling="text", **{"fractions": (1, 0, 0), **settings})
    prompts = {}
    for number in range(len(made)):
        asked, said = parts(made, number)
        prompts.setdefault(said, set()).add((asked, made._split[number]))
    for number in range(len(made)):
        asked, said = parts(made, number)[0], parts(made, number, side=1)[1]
        assert any(other != asked and split == made._split[number] for other, split in prompts[said])


def test_replies_to_one_prompt_alone_are_too_few_for_kto(tmp_path):
    with pytest.raises(DataError, match="two in each"):
        corpus(tmp_path, [{"prompt": f"q{' ' * i}", "completion": f"{i}", "label": True} for i in range(8)],
               spelling="text", fractions=(1, 0, 0))


def test_white_space_makes_no_other_prompt(tmp_path):
    plain = pairs(60)
    spaced = [{**record, "prompt": f" {record['prompt']}\n"} for record in plain]
    assert corpus(tmp_path, [*plain, *spaced]).facts["duplicates"]["exact"]["documents"] == 60
    made = corpus(tmp_path, [*plain, *({**record, "chosen": "well"} for record in spaced)], fractions=(0.6, 0.2, 0.2))
    np.testing.assert_array_equal(made._split[:60], made._split[60:])
    assert set(made._split) == {0, 1, 2}


def test_half_a_surrogate_pair_is_counted(tmp_path):
    made = corpus(tmp_path, [*pairs(), {"prompt": "p", "chosen": "half \ud83d", "rejected": "no"}], spelling="text")
    assert len(made) == 40 and made.facts["skipped"]["lone surrogate"]["count"] == 1
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in
                            [("a", "x"), ("b", "y"), ("half \ud83d", "x"), ("c", "\ud83d")]))
    labelled = LabelledData(path=str(path), fractions=(1, 0, 0)).prepare(BytesConfig(), context=20, cache=tmp_path)
    assert labelled.labels == ["x", "y"] and labelled.facts["skipped"]["lone surrogate"]["count"] == 2


def test_the_order_is_one_for_any_number_of_ranks_and_is_found_again(tmp_path):
    made = corpus(tmp_path, pairs(), spelling="text", fractions=(1, 0, 0))
    whole = made.loader("train", rows=8, seed=3)
    batches = [next(whole) for _ in range(7)]        # more than an epoch
    halves = [made.loader("train", rows=8, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for batch in batches:
        parts = [next(half) for half in halves]
        weights = torch.cat([part["weight"].sum(-1) for part in parts])
        torch.testing.assert_close(weights, batch["weight"].sum(-1))
    again = made.loader("train", rows=8, seed=3)
    again.load_state_dict({**again.state_dict(), "position": 5})
    torch.testing.assert_close(next(again)["tokens"], batches[5]["tokens"])


def test_nothing_usable_and_mixtures_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path is not given"):
        PreferenceData().prepare(BytesConfig(), context=8)
    with pytest.raises(DataError, match="no judgement that can be used"):
        corpus(tmp_path, [{"text": "a"}])
    with pytest.raises(DataError, match=r"data\.unpair=true"):
        corpus(tmp_path, [*pairs(5), {"prompt": "a", "completion": "b", "label": True}])


def test_labelled_texts_are_read_to_their_end_or_cut(tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * (1 + i), "label": i % 3}) + "\n" for i in range(30))
                    + '{"text": "", "label": 1}\n{"text": "x"}\n')
    made = LabelledData(path=str(path), fractions=(1, 0, 0)).prepare(BytesConfig(), context=20, cache=tmp_path)
    assert made.labels == ["0", "1", "2"] and made.facts["labels"] == {"0": 10, "1": 10, "2": 10}
    assert made.facts["cut"] == 21 and len(made.facts["skipped"]) == 2
    shown = look(made, documents=1)["documents"][0]
    assert (shown["source"], shown["tokens"]) == ("0", 3)
    batch = next(made.batches("train", rows=30))
    assert batch["tokens"].shape == (30, 20) and batch["places"].tolist() == [min(2 * i + 2, 19) for i in range(30)]
    assert batch["labels"].tolist() == [i % 3 for i in range(30)]
    path.write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(DataError, match="1 different labels"):
        LabelledData(path=str(path)).prepare(BytesConfig(), context=20, cache=tmp_path)
