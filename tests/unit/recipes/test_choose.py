"""`plan --budget`: the choice by law, its refusals below the laws' range, and the choice by small runs."""

import itertools
import shlex
from io import StringIO
from random import Random
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.distributed.run import get_args_parser

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.models import count
from dougong.plan.budget import Budget, parse_text
from dougong.plan.curve import effective_tokens
from dougong.plan.laws import CHINCHILLA
from dougong.plan.machine import machine
from dougong.recipes import small_runs
from dougong.recipes.choose import _launch, plan_budget
from dougong.recipes.derive import fit_to_data, parse_size, resolve
from dougong.recipes.launch import why_not
from dougong.recipes.plan_recipe import plan_recipe
from dougong.recipes.recipe import load_recipe
from dougong.recipes.show_choice import print_choice
from dougong.report.budget_page import render_budget

HERE = ["runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1"]


@pytest.fixture(scope="module")
def three_days():
    return plan_budget(budget="8 h200 x 3 days")


def resolved(plan):
    """The recipe that the plan's overrides make, with the vocabulary its tokenizer would have."""
    recipe = resolve(load_recipe(plan["recipe"], [*HERE, *plan["overrides"]])[0])[0]
    return fit_to_data(recipe, {"vocab_size": recipe.tokenizer.vocab_size})[0]


def test_eight_gpus_for_three_days_stand_inside_the_laws(three_days):
    choice = three_days["choice"]
    assert 1.5e9 < choice["parameters"] < 4.5e9 and 10 < choice["tokens"] / choice["parameters"] < 40
    assert three_days["refused"] is None and 2 < three_days["loss"]["value"] < 2.6
    assert three_days["loss"]["extrapolated"] == []
    spent = choice["flops_per_token"] * choice["tokens"]
    assert spent == pytest.approx(Budget(8, machine("h200"), 3 * 86_400).flops_per_s("bf16") * 3 * 86_400, rel=0.3)


def test_the_chosen_shape_is_the_best_of_the_curve_or_within_noise_of_it(three_days):
    losses = {option["size"]: option["loss"] for option in three_days["curve"]}
    assert losses[three_days["choice"]["size"]] <= min(losses.values()) * 1.001
    assert min(losses.values()) < min(three_days["curve"][0]["loss"], three_days["curve"][-1]["loss"])


def test_the_overrides_make_the_chosen_recipe(three_days):
    recipe = resolved(three_days)
    assert count.parameters(recipe.model)["total"] == three_days["choice"]["parameters"]
    assert recipe.train.steps == three_days["steps"] and recipe.train.rows == three_days["rows"]
    assert recipe.layout.size("shard", "replicate", "tensor", "pipeline", "context") == 8
    read = recipe.train.steps * recipe.train.rows * recipe.model.context
    assert read == pytest.approx(three_days["choice"]["tokens"], rel=0.01)
    assert three_days["command"].startswith("torchrun --standalone --nproc-per-node 8 -m dougong train first size=")


def launched(words):
    """How many processes torchrun starts, and the overrides it hands to `dougong train first`."""
    assert words[0] == "torchrun"
    launch = get_args_parser().parse_args(words[1:])
    assert launch.standalone or (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", "HOST:PORT")
    assert launch.module and launch.training_script == "dougong"
    hosts = 1 if launch.standalone else int(launch.nnodes)
    return hosts, int(launch.nproc_per_node), launch.training_script_args


@pytest.mark.parametrize(("devices", "kind", "hosts", "each"), [
    (8, "h200", 1, 8), (64, "h200", 8, 8), (12, "h200", 2, 6), (4, "rtx3090", 2, 2)])
def test_every_device_gets_a_process_and_every_host_as_many(devices, kind, hosts, each):
    assert launched(_launch(Budget(devices, machine(kind), 60.0))) == (hosts, each, [])


def test_training_accepts_the_command_for_several_devices(three_days):
    overrides = ["layout=auto", "data.split.fractions=[0.9,0.1,0]", "train.gradient_checkpointing=true"]
    for plan, given in ((three_days, []), (plan_budget(budget="4 rtx3090 x 40 weeks", overrides=overrides), overrides)):
        hosts, each, words = launched(shlex.split(plan["command"]))
        assert words == ["train", "first", *given, *plan["overrides"]]
        recipe = resolve(load_recipe("first", [*words[2:], *HERE])[0])[0]
        assert recipe.layout.on(hosts * each) == recipe.layout and why_not(recipe, recipe.layout) is None


def test_terminal_and_page_show_the_command_whole(three_days):
    terminal = StringIO()
    print_choice(three_days, Console(file=terminal, width=80))
    assert three_days["command"] in terminal.getvalue() and three_days["command"] in render_budget(three_days)


def test_every_number_has_a_source_and_those_outside_a_range_say_so(three_days):
    assert all(figure["source"] for figure in three_days["figures"])
    step_law = next(figure for figure in three_days["figures"] if figure["name"] == "batch (tokens), Step Law")
    assert step_law["fitted"] and step_law["extrapolated"], "2B parameters are outside Step Law's range"
    others = {law["name"]: law for law in three_days["others"]}
    assert others["nanochat's ratio"]["parameters"] > others["DeepSeek"]["parameters"]


def test_memory_for_serving_bounds_the_size():
    free, tight = (plan_budget(budget="1 h200 x 2 days", memory_for_serving=memory) for memory in (None, "500MB"))
    assert tight["choice"]["parameters"] < free["choice"]["parameters"]
    assert tight["choice"]["parameters"] * 2 <= 500e6 and tight["choice"]["fits"]
    packed = plan_budget(budget="1 h200 x 2 days", memory_for_serving="500MB int8")
    assert packed["choice"]["parameters"] > tight["choice"]["parameters"]


def test_little_text_makes_a_smaller_model_and_counts_its_passes():
    plenty, little = (plan_budget(budget="1 h200 x 1 day", data=data) for data in ("400GB", "2GB"))
    assert plenty["choice"]["epochs"] < 1 and little["choice"]["epochs"] > 4
    assert little["choice"]["parameters"] < plenty["choice"]["parameters"]
    assert little["loss"]["value"] > plenty["loss"]["value"]
    assert "four passes" in next(f for f in little["figures"] if f["name"] == "passes over the text")["note"]


@pytest.mark.parametrize("budget", ["here x 1 hour", "1 rtx3090 x 1 hour"])
def test_below_the_laws_no_loss_is_promised_and_the_probe_is_offered(budget):
    plan = plan_budget(budget=budget)
    assert plan["loss"] is None and "--probe" in plan["refused"] and "No loss is predicted" in plan["refused"]
    size = next(figure for figure in plan["figures"] if figure["name"] == "parameters")
    assert any("below" in said for said in size["extrapolated"])


def test_above_the_laws_a_loss_is_marked():
    plan = plan_budget(budget="1 b200 x 300 weeks")
    assert plan["refused"] is None and any("above" in said for said in plan["loss"]["extrapolated"])


def test_time_here_stays_time(tmp_path):
    texts = tmp_path / "my texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text of mine\n" * 2000)
    plan = plan_budget(budget="here x 30 min", data=str(texts))
    assert "train.minutes=30" in plan["overrides"] and f"data.path={texts}" in plan["overrides"]
    assert shlex.split(plan["command"]) == ["dougong", "train", "first", *plan["overrides"]]
    assert plan["choice"]["epochs"] > 100


@pytest.mark.parametrize("data", ["40GB", "2B tokens"])
def test_of_text_that_is_only_an_amount_the_command_leaves_the_place_open(data, tmp_path):
    plan = plan_budget(budget="rtx4090 x 12 hours", data=data)
    assert shlex.split(plan["command"])[:4] == ["dougong", "train", "first", "data.path=YOUR_TEXTS"]
    assert not any("YOUR_TEXTS" in override for override in plan["overrides"])
    own = plan_budget(budget="rtx4090 x 12 hours", data=data, overrides=[f"data.path={tmp_path}"])
    assert "YOUR_TEXTS" not in own["command"] and f"data.path={tmp_path}" in own["command"]
    assert "YOUR_TEXTS" not in plan_budget(budget="rtx4090 x 12 hours")["command"]


def test_a_text_without_hope_of_fitting_is_refused():
    with pytest.raises(ConfigError, match="no shape fits"):
        plan_budget(budget="here x 1 hour", memory_for_serving="10KB")


@pytest.mark.parametrize(("arguments", "says"), [
    ({"budget": "8 h200 x 1 day", "probe": True}, "this machine"),
    ({"budget": "here x 20 s", "probe": True}, "too few"),
    ({"budget": "here x 1 h", "probe": True, "data": "2B tokens"}, "only an amount(.|\n)*data.path=FOLDER"),
    ({"budget": "here x 1 h", "overrides": ["model.dim=128"]}, "model.dim is what"),
    ({"budget": "here x 1 h", "overrides": ["train.steps=9"]}, "train.steps is what"),
    ({"budget": "here x 1 h", "overrides": ["size=3M"]}, "size is what"),
    ({"budget": "here x 1 h", "recipe": "digits_cnn"}, "family"),
    ({"budget": "here x 1 h", "recipe": "frist"}, "first")])
def test_what_cannot_be_planned_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        plan_budget(**arguments)


def test_other_families_and_optimisers_are_planned_too():
    plan = plan_budget(budget="1 h200 x 6 hours", overrides=["model=gpt2", "optim=adamw"])
    assert resolved({**plan, "overrides": ["model=gpt2", "optim=adamw", *plan["overrides"]]}).model.kind == "gpt2"
    assert {"rate, Step Law", "rate, DeepSeek", "rate, OLMo"} <= {figure["name"] for figure in plan["figures"]}
    given = plan_budget(budget="1 h200 x 6 hours", overrides=["optim=adamw", "optim.lr=0.0005"])
    rate = next(figure for figure in given["figures"] if figure["name"] == "rate")
    assert (rate["value"], rate["source"]) == (0.0005, "given in the recipe")


# --- the probe -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("text"), Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrst", k=random.randint(2, 9))) for _ in range(300)]
    for number in range(80):
        (folder / f"{number}.txt").write_text("\n".join(" ".join(random.choices(words, k=9)) for _ in range(60)))
    return folder


UNIQUE = 9e6


@pytest.fixture
def world(monkeypatch):
    """A machine whose speed and a text whose losses are known, so that the best shape is known too."""
    def pace(recipe, corpus):
        return 0.01 + _flops(recipe, corpus) / 300e9

    def loss(parameters, tokens):
        h = 0.06 * (parameters / 2e6) ** -0.4 + 0.18 * (effective_tokens(tokens, UNIQUE) / 6e6) ** -0.4
        return 0.5 + 3 * h / (1 + h)

    def train(recipe, corpus, size, steps):
        shape = small_runs.shape_with(recipe, size, corpus)
        tokens = float(steps * small_runs.tokens_per_step(recipe))
        return small_runs.Small(shape, steps, tokens, pace(recipe, corpus), loss(shape.matrices, tokens))

    def corpus(recipe, progress=None):
        return SimpleNamespace(facts={"splits": splits},
                               tokenizer=SimpleNamespace(vocab_size=recipe.tokenizer.vocab_size))

    splits = {"validation": {"documents": 9, "tokens": 300_000, "bytes": 900_000}, "train": {"tokens": UNIQUE}}
    monkeypatch.setattr(small_runs, "prepare_data", corpus)
    monkeypatch.setattr(small_runs, "measured_peak", lambda: 600e9)
    base, _ = load_recipe("first", [*HERE, "size=null", "train.minutes=null"])
    return base, pace, train, loss


def _flops(recipe, corpus):
    return small_runs.shape_with(recipe, "", corpus).flops_per_token * small_runs.tokens_per_step(recipe)


@pytest.mark.parametrize("compiled", [True, False])
def test_each_small_model_is_compiled_as_if_it_were_the_first(compiled, world, monkeypatch):
    """Of one piece of code torch compiles eight shapes, and runs the others as they are: they would be mistimed."""
    calls = []

    def assemble(recipe, corpus):
        calls.append("assemble")
        return SimpleNamespace(recipe=recipe, state=SimpleNamespace(model=None), objective=None, runtime=None)

    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(small_runs, "assemble", assemble)
    monkeypatch.setattr(small_runs, "measure_step", lambda built, steps: 0.5)
    monkeypatch.setattr(small_runs, "fit", lambda *_: [SimpleNamespace(seconds=0.5)])
    monkeypatch.setattr(small_runs, "quick_score", lambda *_: lambda model: {"bits_per_byte": 2.0})
    settled = small_runs.settle_probe(world[0], 1e5)
    settled = replace(settled, runtime=replace(settled.runtime, compile=compiled))
    recipe, corpus = small_runs.sized(settled, "1M"), small_runs.prepare_data(settled)
    small_runs.measured_pace(recipe, corpus)
    small_runs.train_small(recipe, corpus, "1M", 10)
    assert calls == (["reset", "assemble"] if compiled else ["assemble"]) * 2


@pytest.mark.parametrize("training", [360.0, 1440.0, 14_400.0])
def test_the_probe_chooses_nearly_the_best_shape_and_its_interval_holds(world, training):
    base, pace, train, loss = world
    allowed = max(120.0, 0.176 * training)
    probe = small_runs.run_probe(base, allowed, training, pace=pace, train=train)
    plan = small_runs.choose(base, probe, training, Budget(1, machine("here"), training + allowed), None)
    size, choice = plan["choice"]["size"], plan["choice"]
    reached = {option["size"]: loss(option["matrices"], option["tokens"]) for option in plan["curve"]}
    assert reached[size] <= min(reached.values()) * 1.02
    assert size not in (plan["curve"][0]["size"], plan["curve"][-1]["size"]), "the best lies inside what is considered"
    settled = small_runs.settle_probe(base, small_runs.centre(270e9, training))
    seconds = pace(small_runs.sized(settled, size), small_runs.prepare_data(settled))
    assert choice["tokens"] == pytest.approx(training / seconds * 4096, rel=0.05)
    low, high = plan["loss"]["interval"]
    assert low <= reached[size] <= high < 2 * low
    assert f"train.steps={plan['steps']}" in plan["overrides"] and plan["by"] == "probe"
    rate = next(figure for figure in plan["figures"] if figure["name"] == "rate")
    assert rate["value"] == small_runs.sized(settled, size).optim.lr and "the dial" in rate["source"]
    assert all(figure["source"] for figure in plan["figures"])


def test_of_an_amount_the_probe_reads_a_part_and_the_budget_all_of_it(world, monkeypatch):
    base, pace, train, _ = world
    probe = small_runs.run_probe(base, 120.0, 480.0, pace=pace, train=train)
    monkeypatch.setattr(small_runs, "run_probe", lambda *_, **more: probe)
    money = Budget(1, machine("here"), 600.0)
    own, more = (small_runs.choose_by_probe(base, money, parse_text(text), None) for text in (None, "1B tokens"))
    tokens, held_in = more["choice"]["tokens"], base.data.split.fractions[0]
    assert more["choice"]["epochs"] == pytest.approx(tokens / (held_in * 1e9)) and own["choice"]["epochs"] > 1
    assert more["loss"]["value"] < own["loss"]["value"]
    passes = next(figure for figure in more["figures"] if figure["name"] == "passes over the text")
    assert "the amount given" in passes["source"]


@pytest.mark.parametrize(("allowed", "number"), [(120.0, 2), (540.0, 3), (2000.0, 3)])
def test_no_small_run_ends_in_its_first_steps_and_sizes_are_about_halves(world, allowed, number):
    base, pace, train, _ = world
    probe = small_runs.run_probe(base, allowed, 5 * allowed, pace=pace, train=train)
    assert min(run.steps for run in probe.runs) >= 0.9 * small_runs.FEWEST_STEPS
    long, again = probe.runs[:number], probe.runs[number:]
    sizes = [run.shape.matrices for run in long]
    assert len(sizes) == number and all(1.25 < b / a < 4 for a, b in itertools.pairwise(sizes))
    assert all(run.shape == long[0].shape and run.steps < 0.6 * long[0].steps for run in again)
    assert small_runs._warning(probe) is None
    spent = sum(run.steps * run.seconds_per_step for run in probe.runs)
    assert 0.7 * allowed < spent < 0.95 * allowed


@pytest.mark.parametrize(("allowed", "share", "expected"), [
    (120.0, 0.37, [("a", 444), ("b", 222), ("a", 144)]),      # all in their first steps: the fall is one for all
    (300.0, 0.37, [("a", 1290), ("b", 645)]),                  # those that the shorter run alone would end in
    (2000.0, 0.25, [("a", 5000), ("b", 2500), ("a", 800)])])   # none
def test_the_smallest_trains_again_for_less_where_that_tells_of_the_same(allowed, share, expected):
    plan = small_runs.planned_runs({"a": 0.1, "b": 0.2}, share * allowed, allowed)
    assert plan == expected
    assert sum(steps * {"a": 0.1, "b": 0.2}[size] for size, steps in plan) <= (2 * share + 0.12) * allowed + 0.2


def test_speeds_between_and_beyond_the_measured_shapes():
    probe = small_runs.Probe([], None, 1, 1, 1.0, 0.0, {1e9: 0.01, 4e9: 0.03})   # type: ignore[arg-type]
    assert probe.seconds_per_step(1e9) == pytest.approx(0.01) and probe.seconds_per_step(4e9) == pytest.approx(0.03)
    assert 0.01 < probe.seconds_per_step(2e9) < 0.03
    assert probe.seconds_per_step(8e9) == pytest.approx(0.06) and probe.seconds_per_step(0.5e9) == pytest.approx(0.005)


@pytest.mark.parametrize(("budget", "share"), [(60, 0.3), (400, 0.3), (600, 0.2), (3600, 0.15), (14_400, 0.15)])
def test_the_probe_takes_15_percent_or_two_minutes_but_never_a_third(budget, share):
    assert small_runs.probe_seconds(budget) == pytest.approx(share * budget)


@pytest.mark.slow
def test_the_probe_trains_real_models_and_says_what_it_found(text, monkeypatch):
    """End to end on the smallest scale that trains at all: real steps, real scores."""
    monkeypatch.setattr(small_runs, "FEWEST_STEPS", 8)
    monkeypatch.setattr(small_runs, "_SHORTEST_S", 0.1)
    told = []
    overrides = [*HERE, "tokenizer.vocab_size=300", "model.context=32", "data.dedup.near=false", "evaluate.tokens=2000"]
    plan = plan_budget(budget="here x 12 s", data=str(text), probe=True, overrides=overrides,
                       progress=lambda done, total, what: told.append(what))
    runs = plan["probe"]["runs"]
    assert len(runs) >= 3 and all(0 < run["bits_per_byte"] < 9 for run in runs)
    assert plan["loss"]["interval"][0] < plan["loss"]["value"] < plan["loss"]["interval"][1]
    assert any(what.startswith("probe: small run") for what in told)
    recipe = resolve(load_recipe("first", [*overrides, *plan["overrides"]])[0])[0]
    assert recipe.train.steps == plan["steps"] and parse_size(plan["choice"]["size"]) > 0
    assert runs[-1]["steps"] < runs[0]["steps"], "the smallest again, for less"


def test_the_least_loss_of_a_law_is_where_its_formula_has_it(three_days):
    best = min(three_days["curve"], key=lambda option: option["loss"])
    assert best["matrices"] == pytest.approx(CHINCHILLA.optimum(9.2e20)[0], rel=0.3)


def test_a_probe_that_had_too_little_time_says_so(world):
    base, pace, train, _ = world
    probe = small_runs.run_probe(base, 20.0, 47.0, pace=pace, train=train)
    assert "too short" in small_runs._warning(probe) and len({run.tokens for run in probe.runs}) > 1
    plan = small_runs.choose(base, probe, 47.0, Budget(1, machine("here"), 67.0), None)
    assert plan["probe"]["warning"] and f"train.rows={plan['rows']}" in plan["overrides"]


def test_no_shape_is_considered_twice(three_days):
    for plan in (three_days, plan_budget(budget="here x 1 min")):
        shapes = [(o["num_layers"], o["dim"], o["vocab_size"]) for o in plan["curve"]]
        assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "grpo"])
def test_a_recipe_that_begins_from_a_model_has_to_name_it(recipe):
    for planned in (lambda: plan_budget(budget="here x 1 hour", recipe=recipe),
                    lambda: plan_recipe(load_recipe(recipe, HERE)[0], machine("here"), 1)):
        with pytest.raises(ConfigError, match=r"begins from a model\s+that exists(.|\n)*--model RUN"):
            planned()


@pytest.mark.parametrize("change", ["train.epochs=3", "model={dim: 64}"])
def test_what_the_budget_chooses_cannot_be_given_beside_it(change):
    with pytest.raises(ConfigError, match="is what plan --budget chooses"):
        plan_budget(budget="here x 1 hour", overrides=[change])
