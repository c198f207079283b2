"""What a run needs only at a sample, an evaluation or its end is refused before its first step: later nothing could be
changed any more, and the hours before would be lost."""

import pytest
from feedback_runs import base_run, write_feedback_recipe, write_tasks
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.recipes.assemble import prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.experience import ChatSpelling
from dougong.recipes.recipe import load_recipe

CHARACTERS = {"kind": "characters", "unknown": "refuse"}


@pytest.mark.parametrize(("arguments", "says"), [
    (["sample.prompts=['ab', 'ROMEO']", "train.sample_every=1000"], "'ROMEO' cannot be continued"),
    (["evaluate.stride=64"], "evaluate.stride=64 must lie between 1 and the context of 32"),
    (["evaluate.split=validation", "data.split.fractions=[0.9,0,0.1]"], "there is no 'validation' split"),
], ids=["sample", "stride", "split"])
def test_before_the_first_step(tmp_path, arguments, says):
    recipe = write_recipe(tmp_path / "r.yaml", write_texts(tmp_path / "texts"), model=MODELS["nano"],
                          tokenizer=CHARACTERS)
    refused = dougong("train", recipe, "--run", tmp_path / "run", *arguments)
    assert refused.code == 2 and says in refused.err and not (tmp_path / "run").exists(), refused.err
    assert dougong("train", recipe, "--run", tmp_path / "run", "train.steps=2").code == 0


def test_held_out_tasks_that_leave_no_room_for_an_answer(tmp_path, monkeypatch):
    base_run(tmp_path)
    data = {"kind": "chats", "path": str(write_tasks(tmp_path / "tasks.jsonl")), "fractions": [0.6, 0.2, 0.2]}
    recipe = write_feedback_recipe(tmp_path / "grpo.yaml", "grpo", data, objective={
        "kind": "grpo", "samples": 4, "max_tokens": 6, "reward": "length:3"})
    asked, _ = load_recipe(str(recipe), [f"start.path={tmp_path / 'base'}"])
    held_out = {one.messages[0]["content"] for one in prepare_data(resolve(asked)[0]).conversations("test")}
    monkeypatch.setattr(ChatSpelling, "fits", lambda self, task: task.prompt[0]["content"] not in held_out)
    refused = dougong("train", recipe, "--model", tmp_path / "base", "--run", tmp_path / "run")
    assert refused.code == 2 and "prompts of test leaves room for 6 tokens" in refused.err, refused.err
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_never_chosen_on_the_test_split(tmp_path):
    base_run(tmp_path)
    data = {"kind": "chats", "path": str(write_tasks(tmp_path / "tasks.jsonl"))}
    for name, fractions, splits in (("both", [0.6, 0.2, 0.2], {"validation"}), ("test", [0.7, 0, 0.3], set())):
        recipe = write_feedback_recipe(tmp_path / f"{name}.yaml", "sft", {**data, "fractions": fractions})
        done = dougong("train", recipe, "--model", tmp_path / "base", "--run", tmp_path / name)
        assert done.code == 0, done.err
        events = read_events(RunDirectory(tmp_path / name).events)
        assert {event["split"] for event in events if event["event"] == "evaluation"} == splits
        assert [event["split"] for event in events if event["event"] == "result"] == ["test"]
