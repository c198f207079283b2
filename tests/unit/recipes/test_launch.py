"""Which layouts a recipe is refused under, and with what advice."""

import pytest
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.core.config import replace
from dougong.objectives import OBJECTIVES
from dougong.recipes.derive import fit_to_processes, resolve
from dougong.recipes.launch import micro_batches, why_not
from dougong.recipes.recipe import load_recipe
from dougong.runtime.device import RuntimeConfig
from dougong.runtime.layout import LayoutConfig


@pytest.fixture(scope="module")
def recipe():
    return resolve(load_recipe("first", ["train.rows=704", "size=1M", "model.context=64", "train.minutes=null",
                                         "train.steps=2"])[0])[0]


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto", "orpo", "reward", "classify_text"])
def test_what_judges_whole_texts_is_not_cut_along_them(recipe, kind, axis):
    judging = replace(recipe, objective=OBJECTIVES[kind]())
    reason = why_not(judging, LayoutConfig(replicate=1, **{axis: 2}))
    assert f"objective.kind={kind}" in reason and f"along {axis}" in reason
    for rows in (LayoutConfig(replicate=2), LayoutConfig(replicate=1, shard=2)):
        assert "KTO judges" in why_not(judging, rows) if kind == "kto" else why_not(judging, rows) is None


@pytest.mark.parametrize(("kind", "copies", "says"), [
    ("distil", False, "one process"), ("gan", False, "share each batch"), ("grpo", True, "layout.replicate alone"),
    ("rejection", True, "layout.replicate alone")])
def test_what_processes_cannot_share_is_refused_before_data_are_read(recipe, kind, copies, says):
    asked = replace(recipe, objective=OBJECTIVES[kind]())
    assert says in why_not(asked, LayoutConfig(replicate=1, shard=2))
    assert (why_not(asked, LayoutConfig(replicate=2)) is None) == copies
    assert why_not(asked, LayoutConfig(replicate=1)) is None


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_a_target_for_each_token_may_be(recipe, axis):
    assert why_not(recipe, LayoutConfig(replicate=1, **{axis: 2})) is None


def test_rows_that_cannot_be_shared_change_before_the_run_and_the_launch_after_it(recipe):
    layout = LayoutConfig(replicate=12, tensor=2)
    assert "Try train.rows=708." in why_not(recipe, layout)
    reason = why_not(recipe, layout, begun=True)
    assert "launch it with 22 or 32 processes" in reason and "train.rows=708" not in reason
    assert why_not(recipe, LayoutConfig(replicate=11, tensor=2), begun=True) is None
    assert "launch it with 1408 processes" in why_not(recipe, LayoutConfig(replicate=705, tensor=2), begun=True)


@pytest.mark.parametrize("name", ["first", "gpt2_124m", "qwen3_1b"])
def test_what_ships_is_shared_by_any_usual_number_of_gpus_and_by_others_when_some_come_or_go(name):
    gpu = RuntimeConfig(device="cuda", precision="bf16", threads=1, compile=True)
    asked = replace(load_recipe(name)[0], runtime=gpu)
    recipe, _ = resolve(asked, elsewhere=True)
    for processes in (2, 4, 8, 16, 32):
        assert why_not(recipe, LayoutConfig(shard=min(processes, 8)).on(processes)) is None, processes


def test_rows_that_nobody_gave_are_rounded_for_other_numbers_too():
    asked = load_recipe("first", ["runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1"])[0]
    recipe, _ = resolve(asked)
    fitted, derived = fit_to_processes(asked, recipe, 5)
    assert (recipe.train.rows, fitted.train.rows, derived[0].value) == (16, 15, 15)
    assert "5 processes share it equally" in derived[0].reason
    assert fit_to_processes(asked, recipe, 8) == (recipe, [])
    given = replace(recipe, train=replace(recipe.train, rows=7))
    assert fit_to_processes(given, given, 5) == (given, [])     # refused later, with what to try


@pytest.mark.parametrize(("rows", "stages", "expected"), [(16, 4, 8), (12, 4, 6), (9, 4, 9), (10, 4, 5), (7, 2, 7),
                                                          (3, 4, 3), (1, 4, 1), (16, 1, 1)])
def test_a_pipeline_has_a_micro_batch_for_each_stage_where_rows_allow(recipe, rows, stages, expected):
    of_rows = replace(recipe, train=replace(recipe.train, rows=2 * rows, micro_rows=None))
    assert micro_batches(of_rows, LayoutConfig(replicate=2, pipeline=stages)) == expected


def test_a_restart_goes_on_with_the_run_of_its_launch_and_no_other_command_of_the_job_does(tmp_path, monkeypatch):
    """torchrun gives its name to every command that one job starts, and to each of their restarts."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "a.yaml", write_texts(tmp_path / "texts", documents=20), model=MODELS["nano"])
    asked = ["train", recipe, "--run", "runs/a", "train.steps=2", "train.trackers=[]"]
    for command, runs in ((asked, ["a"]), (asked, ["a"]), ([*asked, "seed=1"], ["a", "a-2"]),
                          ([*asked, "seed=1"], ["a", "a-2"]), ([*asked[:3], "runs/b", *asked[4:]], ["a", "a-2", "b"])):
        done = dougong(*command)
        assert done.code == 0, done.err
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == runs
    several = dougong("train", recipe, "--run", "runs/s", "--seeds", "2", "train.steps=2", "--json")
    assert several.code == 0 and len({path.name for path in (tmp_path / "runs").glob("s*")}) == 2, several.err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    assert dougong(*asked).code == 0 and (tmp_path / "runs" / "a-3").is_dir()
