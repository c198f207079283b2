"""Runs that train an adapter: the real command, from a run that exists, stopped and gone on with, opened, told of."""

import dataclasses
import json
import shutil
import weakref

import pytest
import torch
import yaml
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.adapt.lora import LoRAConfig
from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.recipes import train
from dougong.recipes.assemble import _whole_model
from dougong.recipes.open_run import _brought, _place, open_run, runtime_here
from dougong.recipes.recipe import recipe_from_run
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.train.safetensors_file import read_header
from dougong.train.shadow import tracked

ADAMW = {"kind": "adamw", "lr": 0.01}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapt")
    recipe = write_recipe(root / "tiny.yaml", write_texts(root / "texts"), model=MODELS["qwen3"])
    assert dougong("train", recipe, "--run", root / "base", "train.steps=6").code == 0
    return root / "base"


def adapt(base, path, *arguments, command="train", run=True):
    recipe = base.parent / "adapt.yaml"
    write_recipe(recipe, base.parent / "texts", optim=ADAMW)
    values = yaml.safe_load(recipe.read_text())
    del values["model"], values["tokenizer"]
    recipe.write_text(yaml.safe_dump(values))
    return dougong(command, recipe, "--model", base, *(["--run", path] if run else []), *arguments)


def tensors_of(run):
    steps = RunDirectory(run).checkpoint_steps()
    return read_header(RunDirectory(run).checkpoint(steps[-1]) / "model.safetensors")


def weights(run, checkpoint="last"):
    return tracked(open_run(run, checkpoint=checkpoint).model)


@pytest.mark.parametrize(("kind", "base_type"), [("lora", "float"), ("dora", "float"), ("lora", "int4")])
def test_a_run_holds_its_adapter_alone_and_opens_as_a_whole_model(base, tmp_path, kind, base_type):
    done = adapt(base, tmp_path / "run", f"adapt={kind}", "adapt.rank=4", f"adapt.base={base_type}", "--json")
    assert done.code == 0, done.err
    stored = [name for name in tensors_of(tmp_path / "run") if name != "__metadata__"]
    assert stored and all(name.endswith((".lora_a", ".lora_b", ".magnitude")) for name in stored)
    opened, start = open_run(tmp_path / "run"), open_run(base)
    assert list(tracked(opened.model)) == list(tracked(start.model))
    apart = {name: bool((t != tracked(start.model)[name]).any()) for name, t in tracked(opened.model).items()}
    matrices = {name for name in apart if "norm" not in name and (".attention." in name or ".feed_forward." in name)}
    assert {name for name, differs in apart.items() if differs} == matrices
    events = {event["event"]: event for event in read_events(RunDirectory(tmp_path / "run").events)}
    whole = sum(p.numel() for p in opened.model.parameters())
    assert 0 < events["model"]["parameters"]["trained"] < whole == events["model"]["parameters"]["total"]
    merged = events["merged"]
    assert merged["largest_difference"] <= merged["allowed"] and merged["matrices"] == 14
    assert dougong("generate", tmp_path / "run", "ab", "--tokens", "3").code == 0


def test_an_interrupted_adapter_run_ends_as_one_that_was_not(base, tmp_path):
    whole = adapt(base, tmp_path / "whole", "adapt=dora", "adapt.rank=4", "adapt.dropout=0.2")
    assert whole.code == 0, whole.err
    stopped = adapt(base, tmp_path / "stopped", "adapt=dora", "adapt.rank=4", "adapt.dropout=0.2")
    assert stopped.code == 0
    run = RunDirectory(tmp_path / "stopped")
    for step in run.checkpoint_steps():      # as if it had been killed at step 20: what came later is gone
        if step > 20:
            shutil.rmtree(run.checkpoint(step))
    assert run.checkpoint_steps()[-1] == 20
    lines = [line for line in run.events.read_text().splitlines()
             if json.loads(line).get("step", 0) <= 20 and json.loads(line)["event"] not in ("end", "result", "merged")]
    run.events.write_text("\n".join(lines) + "\n")
    assert dougong("train", "--resume", "--run", run.path).code == 0
    expected, found = weights(tmp_path / "whole"), weights(run.path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_rank_and_rate_are_derived_with_their_reasons(base, tmp_path):
    shown = adapt(base, tmp_path / "run", "adapt=lora", "optim.lr=null")
    assert shown.code == 0, shown.err
    recipe, _ = recipe_from_run(RunDirectory(tmp_path / "run").recipe)
    derived = {item["key"]: item for event in read_events(RunDirectory(tmp_path / "run").events)
               if event["event"] == "derived" for item in event["values"]}
    assert recipe.adapt.rank == derived["adapt.rank"]["value"] == 8 and "tokens" in derived["adapt.rank"]["reason"]
    assert recipe.optim.lr == derived["optim.lr"]["value"] > 1e-3 and "10 times" in derived["optim.lr"]["reason"]


def test_a_base_that_changed_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(base.parent / "texts", tmp_path / "texts", dirs_exist_ok=True)
    done = adapt(tmp_path / "base", tmp_path / "run", "adapt=lora", "adapt.rank=2", "train.steps=2")
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "base")
    other = write_recipe(tmp_path / "other.yaml", tmp_path / "texts", model=MODELS["qwen3"])
    assert dougong("train", other, "--run", tmp_path / "base", "train.steps=2", "seed=1").code == 0
    refused = dougong("generate", tmp_path / "run", "ab")
    assert refused.code == 2 and "has changed since" in refused.err


@pytest.mark.parametrize(("arguments", "says"), [
    (["optim=muon"], "optim.kind=adamw"), (["adapt.targets=['*.nothing']"], "matches no matrix"),
    (["adapt.rnak=3"], "rnak")])
def test_what_does_not_fit_is_refused_before_anything_is_trained(base, tmp_path, arguments, says):
    refused = adapt(base, tmp_path / "run", "adapt=lora", *arguments)
    assert refused.code == 2 and says in refused.err


def test_an_adapter_without_a_model_to_adapt_is_refused(base, tmp_path):
    recipe = write_recipe(tmp_path / "none.yaml", base.parent / "texts", optim=ADAMW, model=MODELS["qwen3"])
    refused = dougong("train", recipe, "--run", tmp_path / "run", "adapt=lora")
    assert refused.code == 2 and "--model RUN" in refused.err


def test_inspect_tells_of_the_adapter_and_its_base(base, tmp_path):
    assert adapt(base, tmp_path / "run", "adapt=lora", "adapt.rank=2", "train.steps=2").code == 0
    told = dougong("inspect", tmp_path / "run", "--json")
    assert told.code == 0, told.err
    assert told.json["facts"]["adapter"] == {"kind": "lora", "rank": 2, "alpha": 32.0, "base": "float",
                                             "of": str(base)}
    assert "rank 2" in dougong("inspect", tmp_path / "run").err + dougong("inspect", tmp_path / "run").out


def test_a_dry_run_predicts_less_memory_than_training_all_of_it(base, tmp_path):
    def predicted(*arguments):
        told = adapt(base, None, "--dry-run", "--json", *arguments, run=False)
        assert told.code == 0, told.err
        return told.json

    whole, adapted = predicted(), predicted("adapt=lora", "adapt.rank=4")
    assert adapted["parameters_trained"] < adapted["parameters"] == whole["parameters"]
    assert adapted["optimizer_bytes"] < 0.5 * whole["optimizer_bytes"]
    assert adapted["checkpoint_bytes"] < 0.5 * whole["checkpoint_bytes"]
    assert adapted["flops_per_step"] < whole["flops_per_step"]


@pytest.mark.parametrize(("model", "tables"), [("qwen3", ("stem.tokens.weight",)),
                                               ("llama", ("stem.tokens.weight", "head.weight"))])
def test_where_tokens_were_added_their_tables_are_trained_beside_the_adapter(tmp_path, model, tables):
    from dougong.core.config import replace
    from dougong.recipes.derive import fit_to_data
    from dougong.recipes.recipe import StartConfig, load_recipe
    from dougong.train.shadow import moving

    recipe, _ = load_recipe(str(write_recipe(tmp_path / "r.yaml", tmp_path, model={
        **MODELS[model], "vocab_size": 256, "tied": len(tables) == 1})), ["adapt=lora", "adapt.rank=2"])
    grown, derived = fit_to_data(replace(recipe, start=StartConfig(path="anywhere")), {"vocab_size": 260})
    assert grown.model.vocab_size == 260 and grown.adapt.also == tables
    assert any(item.key == "adapt.also" and "4 tokens were added" in item.reason for item in derived)
    whole = grown.adapt.apply(grown.model.build(), seed=0)
    assert set(tables) <= set(moving(whole))


@pytest.mark.parametrize("model", ["qwen3", "llama"])
def test_tokens_of_the_chat_template_are_learned_where_the_model_only_kept_rows_for_them(tmp_path, model):
    texts, bpe = write_texts(tmp_path / "texts"), {"kind": "bpe", "vocab_size": 400}
    base = write_recipe(tmp_path / "base.yaml", texts, model=MODELS[model], tokenizer=bpe)
    assert dougong("train", base, "--run", tmp_path / "base", "train.steps=4").code == 0
    for name, start in (("first", tmp_path / "base"), ("second", tmp_path / "first")):
        done = dougong("train", "sft", "--model", start, "--run", tmp_path / name, "adapt=lora", "adapt.rank=2",
                       "data={kind: chats, sources: [{kind: tasks, skills: [copying], items: 200}]}", "train.steps=3",
                       "train.epochs=null", "optim.lr=0.01")
        assert done.code == 0, done.err
    tables = {"stem.tokens.weight", *(["head.weight"] if model == "llama" else [])}
    first, second = (recipe_from_run(RunDirectory(tmp_path / name).recipe)[0].adapt for name in ("first", "second"))
    assert set(first.also) == tables and not second.also       # now they mean something
    told = [item["reason"] for event in read_events(RunDirectory(tmp_path / "first").events)
            if event["event"] == "derived" for item in event["values"] if item["key"] == "adapt.also"]
    assert len(told) == 1 and "<|im_start|>" in told[0] and "noise" in told[0]
    assert tables <= set(tensors_of(tmp_path / "first"))


def test_the_card_counts_an_adapter_with_the_model_that_it_belongs_to(base, tmp_path):
    from dougong.recipes.card import _sizes

    assert adapt(base, tmp_path / "run", "adapt=lora", "adapt.rank=2", "train.steps=2").code == 0
    opened = open_run(tmp_path / "run")
    file = opened.directory.checkpoint(opened.step) / "model.safetensors"
    assert _sizes(opened)["disk_bytes"] == _sizes(opened)["memory_bytes"] > 2 * file.stat().st_size


def test_a_gpu_never_holds_in_fp32_what_only_reads_or_is_frozen(base):
    """The meta device in the place of a GPU."""
    opened = open_run(base)
    gpu = Runtime(device=torch.device("meta"), dtype=torch.bfloat16)
    assert _place(gpu, True).device.type == "cpu" and _place(gpu, False) is gpu
    opened.model.compute_dtype = torch.bfloat16
    read = _brought(opened.model, gpu, True)
    assert {(p.device.type, p.dtype) for p in read.parameters() if p.ndim > 1} == {("meta", torch.bfloat16)}
    recipe = dataclasses.replace(opened.recipe, adapt=LoRAConfig(rank=2))
    built = _whole_model(recipe, gpu, None)
    kept = {(p.device.type, p.dtype, p.requires_grad) for p in built.parameters() if p.ndim > 1}
    assert kept == {("meta", torch.bfloat16, False), ("meta", torch.float32, True)}


def test_an_imported_model_is_computed_where_this_machine_computes_best(monkeypatch):
    section = RuntimeConfig(compile=False)
    assert (runtime_here(section).device, runtime_here(section).precision) == ("cpu", "fp32")
    monkeypatch.setattr("dougong.recipes.open_run.best_device", lambda: "cuda")
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert (runtime_here(section).device, runtime_here(section).precision) == ("cuda", precision)
    assert runtime_here(RuntimeConfig(device="cuda", precision="fp32")).precision == "fp32"


def test_what_trained_is_let_go_before_the_score_opens_a_model_of_its_own(base, tmp_path, monkeypatch):
    held, fit, score = [], train._fit, train._score_final

    def fitted(reporter, built, *more):
        held.append(weakref.ref(built.state.model))
        return fit(reporter, built, *more)

    def scored(*arguments):
        assert held[0]() is None
        return score(*arguments)

    monkeypatch.setattr(train, "_fit", fitted)
    monkeypatch.setattr(train, "_score_final", scored)
    done = adapt(base, tmp_path / "run", "adapt=lora", "adapt.rank=2", "train.steps=2", "--json")
    assert done.code == 0, done.err
    assert done.json["step"] == 2 and done.json["result"] and held
