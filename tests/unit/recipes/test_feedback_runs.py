"""Learning from judgements as whole runs: what comes out, what is refused, and stopped runs that go on."""

import json

import numpy as np
import pytest
import torch
from feedback_runs import base_run, write_feedback_recipe, write_pairs, write_tasks
from tiny_recipe import dougong

from dougong.adapt.rewards import Reply, Task
from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.data.conversations import Conversation
from dougong.data.turns import template_for_training, with_turns
from dougong.objectives.objective import batch_fields
from dougong.objectives.policy import FIGURES
from dougong.recipes.assemble import assemble, build_model, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.experience import ChatSpelling, task_of
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import load_recipe
from dougong.recipes.scored import model_reward
from dougong.recipes.train import _watchers
from dougong.runtime.device import be_deterministic
from dougong.train.safetensors_file import read_header
from dougong.train.shadow import tracked


@pytest.fixture(scope="module")
def root(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("feedback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOUGONG_CACHE", str(folder / "cache"))
        base_run(folder)
        yield folder


def pairs(root, **more):
    return {"kind": "preferences", "path": str(write_pairs(root / "pairs.jsonl")), "spelling": "text",
            "fractions": [0.7, 0.15, 0.15], **more}


def tasks(root):
    return {"kind": "chats", "path": str(write_tasks(root / "tasks.jsonl")), "fractions": [0.6, 0.2, 0.2]}


def trained(root, name, recipe, *more):
    done = dougong("train", recipe, "--model", root / "base", "--run", root / name, "--json", *more)
    assert done.code == 0, done.err
    return done.json


def weights(path):
    return tracked(open_run(path, checkpoint="last").model)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "orpo", "kto", "reward"])
def test_each_objective_learns_the_planted_preference_and_is_scored(root, kind):
    recipe = write_feedback_recipe(root / f"{kind}.yaml", "dpo", pairs(root, unpair=kind == "kto"),
                                   objective={"kind": kind, **({"beta": 0.5} if kind == "kto" else {})},
                                   train={"steps": 60, "checkpoint_every": 60},
                                   optim={"kind": "adamw", "lr": 5e-3})
    result = trained(root, kind, recipe)["result"]
    assert result["accuracy"] > 0.7 and np.isfinite(result["loss"])
    again = dougong("eval", root / kind, "--json")
    assert again.code == 0, again.err
    assert again.json["accuracy"] == result["accuracy"]


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto", "reward", "grpo"])
def test_a_dry_run_plans_the_batch_that_the_objective_reads(root, kind):
    rollouts = kind == "grpo"
    recipe = write_feedback_recipe(
        root / f"dry-{kind}.yaml", "grpo" if rollouts else "dpo",
        tasks(root) if rollouts else pairs(root, unpair=kind == "kto"),
        objective={"kind": kind, **({"samples": 4, "max_tokens": 6, "reward": "length:3"} if rollouts else {})})
    told = dougong("train", recipe, "--model", root / "base", "--dry-run", "--json")
    assert told.code == 0, told.err
    assert told.json["memory_bytes"] > 0 and told.json["flops_per_step"] > 0
    asked, _ = load_recipe(str(recipe), [f"start.path={root / 'base'}"])
    built = assemble(resolve(asked)[0], prepare_data(resolve(asked)[0]))
    batch = next(iter(built.state.loader))
    planned = batch_fields(built.recipe.objective, batch.rows, batch["tokens"].shape[-1])
    assert set(planned) == set(batch) - set(FIGURES)
    for name, (shape, dtype) in planned.items():
        assert (tuple(batch[name].shape), batch[name].dtype) == (shape, dtype), name


@pytest.mark.parametrize("kind", ["text", "preferences", "chats"])
def test_only_a_loss_of_text_is_told_in_bits_per_byte(root, kind):
    path, changes = root / "tiny.yaml", []
    if kind != "text":
        data = pairs(root) if kind == "preferences" else tasks(root)
        path = write_feedback_recipe(root / f"told-{kind}.yaml", "dpo" if kind == "preferences" else "sft", data)
        changes = [f"start.path={root / 'base'}"]
    recipe, _ = resolve(load_recipe(str(path), changes)[0])
    assert recipe.data.kind == kind
    view = _watchers(RunDirectory(root / "told"), recipe, prepare_data(recipe), 0)[-1]
    view({"event": "step", "step": 1, "time": 0.0, "loss": 0.69})
    assert ("bpb" in dict(view.numbers.fields())) == (kind == "text")


def stop_and_go(root, name, recipe):
    """The run in one go, and in two: stopped at step 4 by a copy of what lay on disk then."""
    import shutil

    trained(root, f"{name}-whole", recipe)
    shutil.copytree(root / f"{name}-whole", root / f"{name}-parts")
    directory = RunDirectory(root / f"{name}-parts")
    shutil.rmtree(directory.checkpoint(6))
    kept = [line for line in directory.events.read_text().splitlines()
            if '"event": "end"' not in line and '"event":"end"' not in line]
    directory.events.write_text("\n".join(kept) + "\n")
    done = dougong("train", "--resume", "--run", directory.path, "--json")
    assert done.code == 0, done.err
    assert any(event["event"] == "start" and event["resumed_from"] == "step-000004"
               for event in read_events(directory.events))
    for name_of, tensor in weights(root / f"{name}-whole").items():
        torch.testing.assert_close(weights(directory.path)[name_of], tensor, rtol=0, atol=0)


def test_a_stopped_dpo_run_ends_with_the_same_bits(root):
    stop_and_go(root, "resume-dpo", write_feedback_recipe(root / "resume-dpo.yaml", "dpo", pairs(root)))


def test_a_stopped_run_of_rollouts_ends_with_the_same_bits(root):
    stop_and_go(root, "resume-grpo", write_feedback_recipe(root / "resume-grpo.yaml", "grpo", tasks(root), objective={
        "kind": "grpo", "samples": 4, "max_tokens": 6, "reward": "length:3"}))


def test_rollouts_are_told_and_scored_by_their_reward(root):
    recipe = write_feedback_recipe(root / "told.yaml", "grpo", tasks(root), objective={
        "kind": "grpo", "samples": 4, "max_tokens": 6, "reward": "length:3"})
    result = trained(root, "told", recipe)["result"]
    assert 0 <= result["reward"] <= 1 and result["loss"] == -result["reward"] and result["tasks"] > 0
    steps = [event for event in read_events(RunDirectory(root / "told").events) if event["event"] == "step"]
    assert {"reward", "passed", "length", "idle_groups", "failed_rewards"} <= steps[-1].keys() | steps[-1].get(
        "metrics", {}).keys()


def test_the_reference_is_computed_once(root, monkeypatch):
    from dougong.recipes import reference

    recipe = write_feedback_recipe(root / "once.yaml", "dpo", pairs(root, fractions=[0.6, 0.2, 0.2]))
    trained(root, "once", recipe)
    monkeypatch.setattr(reference, "_computed", lambda *_: pytest.fail("computed again"))
    trained(root, "once-more", recipe, "optim.lr=1e-4")
    assert dougong("eval", root / "once").code == 0


def test_a_reward_model_rewards_rollouts(root):
    judge = write_feedback_recipe(root / "judge.yaml", "dpo", pairs(root, spelling="chat"), objective="reward")
    trained(root, "judge", judge)
    recipe = write_feedback_recipe(root / "judged.yaml", "grpo", tasks(root), objective={
        "kind": "grpo", "samples": 4, "max_tokens": 6, "reward": f"model:{root / 'judge'}"})
    assert np.isfinite(trained(root, "judged", recipe)["result"]["reward"])
    refused = dougong("train", recipe, "--model", root / "base", f"objective.reward=model:{root / 'base'}")
    assert refused.code == 2 and "objective.kind=reward" in refused.err


def test_runs_of_judgements_are_exported_and_their_card_asks_for_text(root, tmp_path):
    pytest.importorskip("transformers")
    recipe = write_feedback_recipe(root / "leaves.yaml", "dpo", pairs(root))
    trained(root, "leaves", recipe)
    out = dougong("export", root / "leaves", "--out", tmp_path / "hf", "--json")
    assert out.code == 0 and out.json["verified"]["tokens"] > 100, out.err
    made = dougong("compress", root / "leaves", "--card", "--with", root / "base")
    assert made.code == 2 and "--data FOLDER" in made.err


def test_an_adapter_of_judgements_leaves_for_peft(root, tmp_path):
    pytest.importorskip("peft")
    recipe = write_feedback_recipe(root / "apart-dpo.yaml", "dpo", pairs(root))
    trained(root, "apart-dpo", recipe, "adapt=lora", "adapt.rank=2")
    out = dougong("export", root / "apart-dpo", "--to", "peft", "--out", tmp_path / "peft", "--json")
    assert out.code == 0 and out.json["verified"]["reader"] == "PEFT", out.err


def test_a_head_that_gives_numbers_does_not_leave_without_a_word(root, tmp_path):
    recipe = write_feedback_recipe(root / "stays.yaml", "dpo", pairs(root, spelling="chat"), objective="reward")
    trained(root, "stays", recipe)
    for to in ("hf", "gguf", "onnx", "peft"):
        refused = dougong("export", root / "stays", "--to", to, "--out", tmp_path / "out")
        assert refused.code == 2 and "objective.kind=reward" in refused.err and "objective.reward=model:" in refused.err
    assert not list(tmp_path.iterdir())


def test_the_card_of_a_rewarded_run_names_no_folder(root, tmp_path):
    judge = write_feedback_recipe(root / "named-judge.yaml", "dpo", pairs(root, spelling="chat"), objective="reward")
    trained(root, "named-judge", judge)
    recipe = write_feedback_recipe(root / "named.yaml", "grpo", tasks(root), objective={
        "kind": "grpo", "samples": 4, "max_tokens": 6, "reward": f"model:{root / 'named-judge'}"})
    trained(root, "named", recipe)
    assert dougong("export", root / "named", "--out", tmp_path / "hf", "--no-verify").code == 0
    card = (tmp_path / "hf/README.md").read_text()
    assert "reward: model:named-judge" in card and str(root) not in card


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_value_head_is_trained_and_kept_beside_an_adapter(root, kind):
    recipe = write_feedback_recipe(root / "beside.yaml", "dpo", pairs(root), objective="reward")
    trained(root, f"beside-{kind}", recipe, f"adapt={kind}", "adapt.rank=2")
    opened = open_run(root / f"beside-{kind}")
    first = build_model(opened.recipe, opened.runtime).value.weight
    assert opened.recipe.adapt.also == ("value.weight",) and not torch.equal(opened.model.value.weight, first)
    last = RunDirectory(root / f"beside-{kind}").checkpoint(6)
    assert "value.weight" in read_header(last / "model.safetensors")


def test_a_step_takes_as_many_rows_at_once_however_few_samples_were_kept(root):
    recipe = write_feedback_recipe(root / "few.yaml", "grpo", tasks(root), objective={
        "kind": "rejection", "samples": 4, "max_tokens": 6, "reward": "length:3", "passes": 9})
    asked, _ = resolve(load_recipe(str(recipe), [f"start.path={root / 'base'}"])[0])
    built = assemble(asked, prepare_data(asked))
    assert next(built.state.loader).rows == 1 and built.recipe.train.micro_rows == 8


def test_opening_a_reward_model_leaves_threads_determinism_and_random_numbers_as_they_were(root):
    judge = write_feedback_recipe(root / "aside.yaml", "dpo", pairs(root, spelling="chat"), objective="reward")
    trained(root, "aside", judge)
    torch.manual_seed(3)
    expected = torch.rand(3)
    be_deterministic(True)
    try:
        torch.manual_seed(3)
        model_reward(str(root / "aside"))
        assert torch.are_deterministic_algorithms_enabled() and torch.equal(torch.rand(3), expected)
    finally:
        be_deterministic(False)


def test_a_model_learns_to_tell_texts_apart_and_is_scored(root):
    import json

    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcdefghij"), 8)) for _ in range(200)]
    path = root / "labelled.jsonl"
    lines = [{"text": text + "?!"[i % 2], "label": ["asked", "said"][i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = write_feedback_recipe(root / "apart.yaml", "dpo", {"kind": "labelled", "path": str(path)},
                                   objective="classify_text", train={"steps": 40, "checkpoint_every": 40},
                                   optim={"kind": "adamw", "lr": 3e-3})
    result = trained(root, "apart", recipe)["result"]
    assert result["accuracy"] > 0.9
    assert open_run(root / "apart").model.value.weight.shape == (2, 32)
    assert dougong("eval", root / "apart", "--json").json["accuracy"] == result["accuracy"]


@pytest.mark.parametrize("changes,message", [
    (["objective=kto"], "data.unpair=true"),
    (["objective=dpo", "data.unpair=true"], "reads pairs"),
    (["data={kind: text, path: TEXTS}"], "data.kind=preferences"),
    (["data.path=null"], "data.path is not given"),
    (["start=null"], "--model RUN"),
])
def test_what_does_not_fit_is_refused_with_what_would(root, changes, message):
    recipe = write_feedback_recipe(root / "refused.yaml", "dpo", pairs(root))
    refused = dougong("train", recipe, "--model", root / "base", "--run", root / "refused",
                      *(change.replace("TEXTS", str(root / "texts")) for change in changes))
    assert refused.code == 2 and message in refused.err, refused.err


def test_tasks_are_asked_with_the_tools_that_they_name(root):
    tokenizer = with_turns(open_run(root / "base").tokenizer)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    messages = ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})
    template = template_for_training(tokenizer)
    prompt = ChatSpelling(template, tokenizer, longest=999).prompt(task_of(Conversation("a", "a", messages, (tool,))))
    assert prompt == template.encode(messages[:1], tools=(tool,)) and '"name": "add"' in tokenizer.decode(prompt)


@pytest.mark.parametrize("spelling", ["text", "chat"])
def test_a_reward_model_reads_replies_in_the_spelling_that_it_learned(root, spelling):
    judge = write_feedback_recipe(root / f"judge-{spelling}.yaml", "dpo", pairs(root, spelling=spelling),
                                  objective="reward")
    trained(root, f"judge-{spelling}", judge)
    reward = model_reward(str(root / f"judge-{spelling}"))
    corpus = open_run(root / f"judge-{spelling}").corpus
    lines = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    asked = {tuple(reward._ids(Reply(Task(({"role": "user", "content": line["prompt"]},)), line["chosen"])))
             for line in lines}
    batch = next(iter(corpus.batches("train", rows=1)))
    place = int(batch["weight"][0, 0].nonzero().max())      # the reply has been read here, and nothing of its end
    assert tuple(batch["tokens"][0, 0, :place + 1].tolist()) in asked


def test_a_pruned_run_of_preferences_says_what_can_still_be_scored(root, tmp_path):
    recipe = write_feedback_recipe(root / "to-prune.yaml", "dpo", pairs(root))
    trained(root, "to-prune", recipe)
    made = dougong("compress", root / "to-prune", "--prune", "0.3", "--out", tmp_path / "pruned")
    assert made.code == 0, made.err
    refused = dougong("eval", tmp_path / "pruned")
    assert refused.code == 2 and "was made smaller" in refused.err and "--data FOLDER" in refused.err
    assert dougong("eval", tmp_path / "pruned", "--data", root / "texts").code == 0
