"""An adapter trained by several processes, with copies of the model (DDP) or one in parts (FSDP2), is that of one."""

import dataclasses
from dataclasses import replace

import pytest
import torch
import yaml
from matrix import Case, check, divided, reference
from processes import run_processes
from tiny_recipe import MODELS, write_recipe, write_texts

from dougong.adapt.lora import LoRAConfig
from dougong.adapt.qat import QATConfig
from dougong.core.events import read_events
from dougong.nn.init import FanIn, initialise
from dougong.nn.lora import adapters
from dougong.recipes.assemble import assemble
from dougong.recipes.launch import why_not
from dougong.recipes.recipe import StartConfig, load_recipe
from dougong.recipes.train import settle, train_run
from dougong.runtime.layout import LayoutConfig

ADAPTED = Case(packed=True, micro_batches=2)


def _model(kind):
    return LoRAConfig(kind=kind, rank=4).apply(ADAPTED.model.build(), seed=0)


class _Adapted:
    """A model config whose models have an adapter, for the cases of `matrix`."""

    vocab_size = ADAPTED.model.vocab_size

    def __init__(self, kind):
        self.kind = kind

    def build(self):
        model = _model(self.kind)
        model.initialise = lambda seed, model=model, kind=self.kind: _fill(model, kind, seed)
        return model


def _fill(model, kind, seed):
    """First weights, then an adapter that changes something already."""
    type(model).initialise(model, seed)
    LoRAConfig(kind=kind, rank=4).fill(model, seed=seed)
    for part in adapters(model).values():
        part.init["lora_b"] = FanIn(0.3)
    initialise(model, seed, only={f"{name}.lora_b" for name in adapters(model)})


def _case(kind):
    return replace(ADAPTED, model=_Adapted(kind))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("layout", [
    LayoutConfig(replicate=2), LayoutConfig(shard=2), LayoutConfig(replicate=2, shard=2)], ids=str)
def test_adapters_over_rows_divided(kind, layout):
    check(reference(_case(kind)), run_processes(layout.processes, divided, _case(kind), layout))


def test_what_cuts_matrices_apart_is_refused_by_name():
    recipe = dataclasses.replace(load_recipe("first", ["train.rows=8"])[0], start=StartConfig(path="somewhere"),
                                 adapt=LoRAConfig(rank=4))
    assert "replicate and shard alone" in why_not(recipe, LayoutConfig(tensor=2))
    assert why_not(recipe, LayoutConfig(shard=2)) is why_not(recipe, LayoutConfig(replicate=2)) is None
    integers = dataclasses.replace(recipe, adapt=LoRAConfig(rank=4, base="int8"))
    assert "adapt.base=float" in why_not(integers, LayoutConfig(replicate=2))
    assert "one process" in why_not(dataclasses.replace(recipe, adapt=QATConfig()), LayoutConfig(replicate=2))


def _train(recipe, path, layout):
    """Losses by step, and the precisions in which frozen and trained matrices lie."""
    asked, base = load_recipe(str(recipe), changes={"layout": layout})
    train_run(asked, base, path=path)
    settled, _, corpus, runtime, _ = settle(asked)
    model = assemble(settled, corpus, runtime=runtime).state.model
    return ([event["loss"] for event in read_events(path / "events.jsonl") if event["event"] == "step"],
            *({p.dtype for p in model.parameters() if p.ndim > 1 and p.requires_grad is moves}
              for moves in (False, True)))


@pytest.mark.parametrize(("layout", "also"), [
    ({"replicate": 2}, []), ({"shard": 2}, []), ({"shard": 2}, ["stem.tokens.weight", "*norm.weight"])], ids=str)
def test_what_is_frozen_lies_in_parts_as_it_computes_too(tmp_path, layout, also, monkeypatch):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    train = {"minutes": None, "steps": 3, "rows": 8, "micro_rows": 4, "trackers": [], "evaluate_every": 9,
             "sample_every": 9, "checkpoint_every": 9}
    plain = {"evaluate": {"tokens": 300, "baselines": False}, "sample": {"prompts": []}, "train": train,
             "optim": {"kind": "adamw", "lr": 0.01},
             "runtime": {"device": "cpu", "precision": "bf16", "threads": 1, "compile": False}}
    recipe = write_recipe(tmp_path / "base.yaml", write_texts(tmp_path / "texts"), model=MODELS["qwen3"], **plain)
    train_run(*load_recipe(str(recipe)), path=tmp_path / "start")
    values = yaml.safe_load(recipe.read_text())
    del values["model"], values["tokenizer"]
    recipe.write_text(yaml.safe_dump(values | {"start": {"path": str(tmp_path / "start")},
                                               "adapt": {"kind": "lora", "rank": 4, "also": also}}))
    alone, *kept = _train(recipe, tmp_path / "one", {})
    together = run_processes(2, _train, recipe, tmp_path / "two", layout)
    assert kept == [{torch.bfloat16}, {torch.float32}] and all(found[1:] == tuple(kept) for found in together)
    assert together[0][0] == pytest.approx(alone, rel=1e-3) and len(set(alone)) == 3
