"""Held-out questions with answers, asked of a run that learned conversations."""

import io
import json
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from tiny_recipe import MODELS, dougong, write_recipe

from dougong.data.conversations import Conversation
from dougong.generate.replies import replies
from dougong.recipes import answering
from dougong.recipes import judge as judging
from dougong.recipes.answering import answered
from dougong.recipes.judge import judge, print_judged, questions
from dougong.recipes.open_run import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that has learned to say `odd` or `even`, and to decline what is no number."""
    root = tmp_path_factory.mktemp("judge")
    with open(root / "chats.jsonl", "w") as file:
        for n in range(300):
            file.write(json.dumps({"prompt": f"{n}?", "completion": ("even", "odd")[n % 2], "skill": "parity",
                                   "answer": ("even", "odd")[n % 2]}) + "\n")
            file.write(json.dumps({"prompt": f"who is {chr(97 + n % 26)}{n}", "completion": "I cannot say.",
                                   "skill": "declining", "answer": "I cannot say."}) + "\n")
    recipe = write_recipe(root / "tiny.yaml", root, model={**MODELS["qwen3"], "context": 64})
    values = yaml.safe_load(recipe.read_text())
    values["data"] = {"kind": "chats", "path": str(root / "chats.jsonl"), "fractions": [0.8, 0.1, 0.1]}
    values["train"] |= {"steps": 120, "ema": None, "evaluate_every": 60, "checkpoint_every": 60}
    values["sample"] = {"prompts": []}
    recipe.write_text(yaml.safe_dump(values))
    done = dougong("train", recipe, "--run", root / "run", "--json")
    assert done.code == 0, done.err
    return root / "run", done


def test_training_on_conversations_ends_with_its_skills_beside_answers_that_need_no_model(run):
    _, done = run
    judged = done.json["result"]["skills"]
    (score,) = judged["scores"]
    assert score["skill"] == "parity" and score["items"] + judged["outside"]["items"] == judged["items"]
    assert score["model"] > 0.9 and score["majority"] < 0.7
    assert score["nearest"] > 0.7 and not score["claimed"]     # the last digit decides, so a similar question does too
    assert judged["outside"]["declined"] > 0.9 and judged["inside_declined"] < 0.1
    assert "parity" in done.err or "parity" in done.out


def test_replies_are_the_same_whatever_is_asked_beside(run):
    path, _ = run
    opened = open_run(path)
    asked = [question.messages for question in questions(opened.corpus.conversations("test"))][:8]
    together = replies(opened.model, opened.tokenizer, asked)
    alone = [replies(opened.model, opened.tokenizer, [one])[0] for one in asked]
    assert together == alone and all(together)


def test_eval_asks_again_and_finds_the_same(run):
    path, done = run
    again = dougong("eval", path, "--json")
    assert again.code == 0, again.err
    assert again.json["skills"]["scores"] == done.json["result"]["skills"]["scores"]


@pytest.mark.parametrize(("fractions", "judged"), [([0.8, 0.2, 0], True), ([1, 0, 0], False)])
def test_a_journey_without_a_test_split_is_judged_on_validation_or_not_at_all(run, tmp_path, fractions, judged):
    changes = {"data": {"fractions": fractions}, "train": {"steps": 2}}
    (tmp_path / "trip.yaml").write_text(yaml.safe_dump({"stages": {"talk": {
        "kind": "train", "recipe": str(run[0].parent / "tiny.yaml"), "changes": changes}}}))
    done = dougong("train", tmp_path / "trip.yaml", "--run", tmp_path / "trip")
    assert done.code == 0, done.err
    assert (tmp_path / "trip" / "skills.json").is_file() == judged
    refused = dougong("eval", tmp_path / "trip", "--split", "test")
    assert refused.code == 2 and "data.fractions=" in refused.err


def test_stride_has_no_meaning_for_conversations(run):
    refused = dougong("eval", run[0], "--stride", 8)
    assert refused.code == 2 and "stride belongs to the windows of text" in refused.err and "chats" in refused.err


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TALK = Conversation("1", "here", (
    {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "", "train": False, "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {}}}]},
    {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is  4."},
    {"role": "user", "content": "Thank you."}), tools=(TOOL,), skill="sums [/hard]", answer="It is 4.")


def test_a_question_ends_before_the_last_reply_and_keeps_its_tools():
    (question,) = questions([TALK])
    assert [message["role"] for message in question.messages] == ["user", "assistant", "tool"]
    assert question.tools == (TOOL,) and question.prompt == "4" and "train" not in question.messages[1]


def test_both_figures_of_exact_answers_ask_alike_and_compare_alike(run, monkeypatch):
    opened, seen = open_run(run[0]), []

    def said(_model, _tokenizer, talks, config, *, tools, runtime, **_):
        seen.append((talks, tools, config.max_tokens))
        return ["It is\n4." for _ in talks]

    monkeypatch.setattr(answering, "replies", said)
    monkeypatch.setattr(judging, "replies", said)
    corpus = SimpleNamespace(tokenizer=opened.tokenizer, conversations=lambda split: [TALK] * (split == "test"))
    judged = judge(opened.model, opened.tokenizer, opened.runtime, corpus, "test")
    beside = answered(opened.model, corpus, opened.runtime, "test")
    assert seen[0] == seen[1] and seen[0][1] == [(TOOL,)]
    assert seen[0][2] == len(opened.tokenizer.encode(TALK.answer)) + 8
    assert judged["exact_match"] == beside["exact_match"] == 1
    out = io.StringIO()
    print_judged(judged, Console(file=out, width=200))
    assert "sums [/hard]" in out.getvalue()
