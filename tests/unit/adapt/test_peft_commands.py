"""Adapters leave for PEFT and come from it, by the real commands."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_recipe import dougong, write_recipe, write_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

import tiny_hf

from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import recipe_from_run
from dougong.train.shadow import tracked

FAMILIES = ("qwen3", "llama", "gpt2")
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("dougong.recipes.open_run.usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("peft") / "texts", documents=40)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_hf.write(folder / family, family) for family in FAMILIES}


def train(base, texts, path, *arguments):
    recipe = write_recipe(path.with_suffix(".yaml"), texts, optim={"kind": "adamw", "lr": 0.01})
    values = yaml.safe_load(recipe.read_text())
    del values["model"], values["tokenizer"]
    values["train"] |= {"steps": 4, "ema": None}
    recipe.write_text(yaml.safe_dump(values))
    done = dougong("train", recipe, "--model", base, "--run", path, *arguments)
    assert done.code == 0, done.err
    return path


def logits(model, tokens):
    with torch.no_grad():
        output = model(tokens)
    return getattr(output, "logits", output)


TOKENS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("family", "arguments"), [
    ("llama", ["adapt=dora", "adapt.rank=4"]), ("gpt2", ["adapt=lora", "adapt.rank=3"]),
    pytest.param("qwen3", ["adapt=lora", "adapt.rank=4"], marks=pytest.mark.slow),
    pytest.param("qwen3", ["adapt=lora", "adapt.rank=4", "adapt.base=int4"], marks=pytest.mark.slow)])
def test_an_adapter_trained_here_works_in_peft_and_comes_back_as_it_left(bases, texts, tmp_path, family, arguments):
    run = train(bases[family], texts, tmp_path / "run", *arguments)
    out = dougong("export", run, "--to", "peft", "--out", tmp_path / "peft", "--json")
    assert out.code == 0, out.err
    assert out.json["verified"]["reader"] == "PEFT"
    assert set(out.json["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(bases[family].parent) not in (tmp_path / "peft" / "adapter_config.json").read_text()
    back = dougong("import", tmp_path / "peft", "--model", bases[family], "--run", tmp_path / "back")
    assert back.code == 0, back.err
    if "adapt.base=int4" not in arguments:      # what comes back is laid over the base as it is
        theirs = transformers.AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
        torch.testing.assert_close(logits(open_run(run).model, TOKENS), logits(theirs, TOKENS), rtol=1e-4, atol=1e-4)
        mine, again = (tracked(open_run(path).model) for path in (run, tmp_path / "back"))
        for name, tensor in mine.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-7)
        under = [bases[family], "--adapter"]
        written = {dougong("generate", *words, "ab", "--tokens", "8", "--json").json["generations"][0]["text"]
                   for words in ([run], [*under, run], [*under, tmp_path / "peft"])}
        assert len(written) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_pefts_becomes_a_run_that_every_verb_opens(bases, texts, tmp_path, family):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS.get(family, "all-linear"),
                                               task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.eval().save_pretrained(tmp_path / "peft")
    assert dougong("import", tmp_path / "peft", "--model", bases[family], "--run", tmp_path / "run").code == 0
    recipe, _ = recipe_from_run(tmp_path / "run" / "recipe.yaml")
    assert (recipe.adapt.kind, recipe.adapt.rank, recipe.adapt.alpha, recipe.adapt.targets) == ("lora", 4, 6.0, ())
    torch.testing.assert_close(logits(open_run(tmp_path / "run").model, TOKENS), logits(theirs, TOKENS),
                               rtol=1e-4, atol=1e-4)
    told = dougong("inspect", tmp_path / "run", "--json")
    assert told.json["facts"]["adapter"]["of"] == str(bases[family]) and not told.json["problems"]
    scored = dougong("eval", tmp_path / "run", "--data", texts, "--json")
    assert scored.code == 0, scored.err
    whole = dougong("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")
    assert whole.code == 0, whole.err
    again = dougong("export", tmp_path / "run", "--to", "peft", "--out", tmp_path / "again")
    assert again.code == 0, again.err


def test_a_mismatch_deletes_what_was_written(bases, texts, tmp_path, monkeypatch):
    import dougong.recipes.adapters as adapters

    run = train(bases["qwen3"], texts, tmp_path / "run", "adapt=lora", "adapt.rank=4", "optim.lr=0.05")
    honest = adapters.to_peft

    def wrong(*arguments):
        settings, tensors = honest(*arguments)
        return settings | {"lora_alpha": settings["lora_alpha"] * 1.01}, tensors

    monkeypatch.setattr(adapters, "to_peft", wrong)
    refused = dougong("export", run, "--to", "peft", "--out", tmp_path / "peft")
    assert refused.code == 2 and "PEFT computes something else" in refused.err
    assert not (tmp_path / "peft").exists() and not list(tmp_path.glob(".peft*"))


@pytest.mark.parametrize("case", ["whole run", "no model named", "other base", "also"])
def test_what_cannot_be_is_refused_with_what_to_do(bases, texts, tmp_path, case):
    if case == "whole run":
        refused, says = dougong("export", train(bases["gpt2"], texts, tmp_path / "run"), "--to", "peft"), "--to hf"
    elif case == "also":
        run = train(bases["gpt2"], texts, tmp_path / "run", "adapt=lora", "adapt.rank=2", "adapt.also=['*norm.weight']")
        refused, says = dougong("export", run, "--to", "peft"), "adapt.also"
    else:
        run = train(bases["llama"], texts, tmp_path / "run", "adapt=lora", "adapt.rank=2")
        assert dougong("export", run, "--to", "peft", "--out", tmp_path / "peft").code == 0
        if case == "no model named":
            refused, says = dougong("import", tmp_path / "peft", "--run", tmp_path / "back"), "--model RUN"
        else:
            shutil.copytree(bases["llama"], tmp_path / "other")
            tiny_hf.model("llama", seed=1).save_pretrained(tmp_path / "other")
            refused, says = dougong("generate", tmp_path / "other", "a", "--adapter", run), "belongs to another model"
    assert refused.code == 2 and says in refused.err


def test_a_run_may_begin_from_one_that_holds_an_adapter(bases, texts, tmp_path):
    first = train(bases["qwen3"], texts, tmp_path / "first", "adapt=lora", "adapt.rank=2")
    second = train(first, texts, tmp_path / "second", "adapt=lora", "adapt.rank=2", "optim.lr=1e-30")
    a, b = (tracked(open_run(path).model) for path in (first, second))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=0)
