"""`dougong plan RECIPE`: what it measures is what it chose, what it chose fits, and what it advises can be trained."""

import itertools
from types import SimpleNamespace

import pytest

from dougong.adapt.lora import LoRAConfig, adapted_on_meta, trained
from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.data.chats import ChatData
from dougong.models import count
from dougong.objectives import OBJECTIVES
from dougong.plan import probe
from dougong.plan.counts import Counts
from dougong.plan.machine import machine
from dougong.plan.memory import memory
from dougong.plan.step import step_memory
from dougong.recipes import choose
from dougong.recipes import plan_recipe as module
from dougong.recipes.launch import why_not
from dougong.recipes.plan_recipe import plan_recipe, work_of
from dougong.recipes.recipe import StartConfig, load_recipe
from dougong.runtime.layout import AXES, LayoutConfig

SMALL = ["size=null", "tokenizer.vocab_size=512", "model.context=128", "model.dim=64", "model.num_layers=2",
         "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=32", "model.ffn_dim=128", "train.rows=16",
         "train.steps=100", "runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1"]
FULL_ONE_ROW, SELECTIVE_ONE_ROW = 2.52, 3.33
"""MiB of a step of SMALL by arithmetic"""
NONE_16_ROWS, NONE_16_ROWS_EXACTLY = 32.26, 32.30


def cpu(mib, name="small"):
    return replace(machine("h200"), name=name, device="cpu", memory_bytes=mib * 2**20)


def asked(*overrides):
    return load_recipe("first", [*SMALL, *overrides])[0]


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto", "orpo", "reward", "classify_text", "grpo", "rejection"])
def test_what_does_not_learn_from_texts_is_refused_by_name(kind, monkeypatch):
    recipe = replace(asked(), objective=OBJECTIVES[kind]())
    with pytest.raises(ConfigError, match=f"objective.kind={kind}.*\n.*--dry-run"):
        plan_recipe(recipe, cpu(1024), 1)
    monkeypatch.setattr(choose, "load_recipe", lambda *_: (recipe, recipe))
    with pytest.raises(ConfigError, match=f"objective.kind={kind}.*\n.*--dry-run"):
        choose.plan_budget(budget="h200 x 1 hour")


def adapted(**settings):
    return replace(asked("model.vocab_size=512", "optim=adamw"), start=StartConfig(path="somewhere"),
                   adapt=LoRAConfig(**{"rank": 8, **settings}))


@pytest.fixture
def timed(monkeypatch):
    """What the probe times; each step takes a fifth of a second."""
    found = []

    def step_times(work, micro_rows, **_):
        found.append((work.checkpoint, micro_rows))
        return [0.2] * 20

    monkeypatch.setattr(probe, "step_times", step_times)
    return found


@pytest.mark.parametrize(("mib", "recipe", "chosen", "change"), [
    (1000, "true", "none", "false"), (1000, "false", "none", None),
    ((FULL_ONE_ROW + SELECTIVE_ONE_ROW) / 2, "false", "full", "true")])
def test_the_probe_times_the_way_of_checkpointing_that_was_chosen(timed, mib, recipe, chosen, change):
    plan = plan_recipe(asked(f"train.gradient_checkpointing={recipe}"), cpu(mib, "here"), 1)
    best = plan["best"][0]
    assert timed == [(chosen, best["micro_rows"])] and best["checkpoint"] == chosen
    assert best["changes"] == ([] if change is None else [f"train.gradient_checkpointing={change}"])
    assert best["step_seconds"] == pytest.approx(0.2), "the option takes what its steps took"
    assert plan["machine"]["efficiency_source"].startswith("20 real steps")


def test_where_the_exact_count_does_not_fit_the_next_smaller_micro_batch_is_planned():
    between = (NONE_16_ROWS + NONE_16_ROWS_EXACTLY) / 2
    for mib, rows in ((between, 8), (NONE_16_ROWS_EXACTLY + 0.1, 16)):
        best = plan_recipe(asked(), cpu(mib), 1)["best"][0]
        assert (best["micro_rows"], best["checkpoint"], best["fits"]) == (rows, "none", True)
        assert best["capacity_bytes"] == mib * 2**20 and best["bill"]["days"] > 0


def test_where_the_micro_batch_is_given_the_next_way_of_checkpointing_is_planned():
    between = (NONE_16_ROWS + NONE_16_ROWS_EXACTLY) / 2
    best = plan_recipe(asked("train.micro_rows=16"), cpu(between), 1)["best"][0]
    assert best["micro_rows"] == 16 and best["changes"] == ["train.gradient_checkpointing=selective"]


def test_where_no_exact_count_fits_nothing_fits(monkeypatch):
    monkeypatch.setattr(module, "step_memory", lambda step: SimpleNamespace(kinds={"weights": 2.0**31}))
    with pytest.raises(ConfigError, match=r"does not fit 1 x small.\nThe nearest, one process, needs 2.0 GiB"):
        plan_recipe(asked(), cpu(1000), 1)


EIGHT = ["model.num_layers=8", "model.dim=256", "model.num_heads=8", "model.num_kv_heads=8"]
WIDE = ["model.num_layers=16", "model.dim=2048", "model.num_heads=16", "model.num_kv_heads=16", "model.head_dim=128",
        "model.ffn_dim=8192", "model.context=4096", "tokenizer.vocab_size=32768"]
EXPERTS = ["model=qwen3_moe", "model.num_experts=8", "model.top_k=2", "optim=adamw"]


@pytest.mark.parametrize(("overrides", "gib"), [
    ([*EIGHT, "train.rows=18"], 10),
    ([*EIGHT, "train.rows=64", "train.gradient_checkpointing=true"], 10),
    ([*EIGHT, "train.rows=64", *EXPERTS], 10),
    ([*WIDE, "train.rows=64", "train.gradient_checkpointing=selective", "runtime.compile=false"], 15.6)],
    ids=["odd rows", "more kept than asked", "experts", "zero bubbles beside selective checkpointing"])
def test_training_accepts_every_layout_and_change_that_a_plan_prints(overrides, gib):
    gpu = replace(machine("h200"), memory_bytes=gib * 2**30)
    plan = plan_recipe(asked(*overrides, "runtime.precision=bf16"), gpu, 8, simulate=False)
    printed = [option for option in [*plan["best"], *plan["others"]] if option["fits"]]
    assert any(option["layout"]["pipeline"] > 1 for option in printed)
    for option in printed:
        layout = [f"layout.{key}={value}" for key, value in option["layout"].items()]
        recipe, _ = module._elsewhere(asked(*overrides, *layout, *option["changes"]), gpu, 8)
        assert recipe.layout.on(8) == recipe.layout
        assert why_not(recipe, recipe.layout) is None, option["name"]


def test_a_layout_of_ones_own_that_training_refuses_is_refused_for_the_same_reason():
    own = ["layout.pipeline=4", "layout.schedule=interleaved_zb", "train.gradient_checkpointing=selective"]
    recipe = asked(*EIGHT, "train.rows=64", "runtime.compile=false", *own)
    refused = plan_recipe(recipe, machine("h200"), 8, simulate=False)["others"][0]
    assert (refused["layout"]["pipeline"], refused["layout"]["schedule"]) == (4, "interleaved_zb")
    assert "which selective checkpointing does not allow" in refused["refused"]


@pytest.mark.parametrize(("recipe", "says"), [
    (asked("train.steps=null", "train.epochs=3"), "Add train.steps"),
    (adapted(rank=None), r"adapt\.rank follows from the data.*adapt\.rank=16")], ids=["epochs", "rank"])
def test_what_a_plan_cannot_know_or_count_is_refused_with_what_can(recipe, says):
    with pytest.raises(ConfigError, match=says):
        plan_recipe(recipe, cpu(1000), 1)


@pytest.mark.parametrize("base", ["float", "int4"])
def test_an_adapter_fits_where_the_whole_training_does_not_and_costs_what_it_costs(base, timed):
    plan = plan_recipe(adapted(base=base), cpu(1000), 1)
    recipe, best = adapted(base=base), plan["best"][0]
    model = adapted_on_meta(work_of(recipe, cpu(1000)).model, recipe.adapt)
    assert plan["model"]["trained"] == trained(model) < plan["model"]["parameters"]["total"] / 2
    assert plan["model"]["flops_per_token"] == count.flops_per_token(work_of(recipe, cpu(1000)).model, 128,
                                                                     adapter=trained(model))
    assert best["memory"]["optimizer"] == pytest.approx(2 * 4 * trained(model), rel=0.01)
    whole = plan_recipe(asked("optim=adamw"), cpu(1000), 1)["best"][0]
    assert (best["checkpoint"], best["micro_rows"]) == (whole["checkpoint"], whole["micro_rows"])
    between = (best["memory_bytes"] + whole["memory_bytes"]) / 2 / 2**20
    settled = ["train.micro_rows=16", "train.gradient_checkpointing=false"]
    small = plan_recipe(replace(adapted(base=base), train=asked(*settled).train), cpu(between), 1)["best"][0]
    assert small["micro_rows"] == 16 and not small["changes"] and small["seconds"]["optimizer"] < \
        whole["seconds"]["optimizer"] / 2


def test_what_an_adapter_needs_by_arithmetic_is_near_what_a_step_of_it_holds():
    for base, rows in itertools.product(("float", "int4"), (1, 16)):
        work = work_of(adapted(base=base), cpu(1000))
        held = memory(Counts(work.step()), LayoutConfig(replicate=1), "none", rows, 1, gpu=False)
        exact = step_memory(work.step(micro_rows=rows)).peak_bytes
        assert 0.85 < sum(held.values()) / exact < 1.15


def test_an_adapter_that_fits_nowhere_is_told_what_would_help():
    with pytest.raises(ConfigError, match=r"adapt\.base=int4"):
        plan_recipe(adapted(), cpu(0.5), 1)


def test_a_model_that_exists_and_does_not_fit_is_pointed_to_adapters_and_to_shorter_rows():
    whole = replace(asked("model.vocab_size=512", "optim=adamw"), start=StartConfig(path="somewhere"),
                    data=ChatData(row_tokens=48))
    with pytest.raises(ConfigError) as refused:
        plan_recipe(whole, cpu(0.5), 1)
    said = str(refused.value).splitlines()[-1]
    assert "adapt=lora adapt.rank=16 (adapt.base=int4)" in said and "data.row_tokens" in said
    assert "gradient_checkpointing" not in said and "model.context" not in said
    with pytest.raises(ConfigError) as drawn:
        plan_recipe(asked(), cpu(0.5), 1)
    assert "adapt" not in str(drawn.value)


def test_what_is_printed_of_memory_is_said_how_it_was_found(timed):
    for recipe in (asked(), asked("train.gradient_checkpointing=true")):
        plan = plan_recipe(recipe, cpu(1000), 1)
        assert set(plan["best"][0]["memory"]) <= set(plan["memory_how"]) and plan["best"][0]["memory"]["inputs"] > 0


def test_on_several_devices_an_adapter_is_copied_or_in_parts_and_nothing_else():
    plan = plan_recipe(adapted(), cpu(1000), 4)
    printed = [*plan["best"], *plan["others"]]
    fitting = [option["layout"] for option in printed if option["fits"]]
    assert {axis for layout in fitting for axis in AXES if (layout[axis] or 1) > 1} == {"replicate", "shard"}
    refused = [option["refused"] for option in printed if not option["fits"]]
    assert refused and all("along replicate and shard alone" in reason for reason in refused)
    integers = plan_recipe(adapted(base="int4"), cpu(1000), 1)["best"][0]
    assert integers["fits"]
    with pytest.raises(ConfigError, match=r"adapt\.base=float"):
        plan_recipe(adapted(base="int4"), cpu(1000), 2)


def test_the_probe_takes_steps_of_the_adapter():
    work = work_of(replace(adapted(), train=asked("train.rows=2").train), cpu(1000))
    assert all(seconds > 0 for seconds in probe.step_times(work, 2, steps=2))


def test_rows_shorter_than_the_context_are_planned_as_they_are():
    recipe = asked()
    chats = replace(recipe, data=ChatData(row_tokens=48))
    assert [work_of(one, cpu(1000)).context for one in (chats, recipe)] == [48, 128]
