"""Several seeds of one recipe differ in nothing else."""

from itertools import count

import pytest
import yaml
from tiny_recipe import dougong, write_recipe, write_texts

from dougong.core.config import difference
from dougong.recipes.recipe import recipe_from_run


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    path = write_recipe(tmp_path / "tiny.yaml", write_texts(tmp_path / "texts"))
    values = yaml.safe_load(path.read_text())
    values["train"] |= {"steps": None, "minutes": 0.004, "micro_rows": None}
    values["evaluate"] |= {"baselines": False}
    path.write_text(yaml.safe_dump(values))
    return path


def test_what_the_first_seed_measures_is_that_of_all(recipe, tmp_path, monkeypatch):
    measured = count(1)
    monkeypatch.setattr("dougong.recipes.train.measure_step", lambda built: 0.01 * next(measured))   # a busy machine
    done = dougong("train", recipe, "--seeds", 2, "--run", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    first, second = (recipe_from_run(tmp_path / f"run-seed{seed}" / "recipe.yaml")[0] for seed in (0, 1))
    assert difference(first, second) == {"seed": (0, 1)} and first.train.steps == 24


def test_runs_without_a_score_were_not_stopped(recipe, tmp_path):
    done = dougong("train", recipe, "data.split.fractions=[1,0,0]", "--seeds", 2, "--run", tmp_path / "run")
    assert done.code == 2 and "nothing is held out" in done.err and "stopped" not in done.err
