"""`dougong.train` takes what the command line takes, in the same way. Trains nothing."""

from types import SimpleNamespace

import pytest

import dougong.api as api
from dougong.core.errors import ConfigError
from dougong.recipes.recipe import load_recipe


@pytest.fixture
def asked(monkeypatch):
    """What would be trained, by the arguments of `dougong.train`."""
    told = []

    def train_run(recipe, base, *, path=None):
        told.append((recipe, base))
        return SimpleNamespace(directory=SimpleNamespace(report=path))

    monkeypatch.setattr(api, "train_run", train_run)
    monkeypatch.setattr(api, "write_report", lambda *_: None)

    def ask(*arguments, **sections):
        api.train(*arguments, **sections)
        return told[-1][0]

    return ask


def lengths(recipe):
    return recipe.train.steps, recipe.train.minutes, recipe.train.epochs


def test_a_length_given_as_a_value_takes_back_the_recipes_own(asked):
    assert lengths(asked("shakespeare_char_cpu", train={"minutes": 1})) == (None, 1, None)
    assert lengths(asked("first", train={"epochs": 2})) == (None, None, 2)
    with pytest.raises(ConfigError, match=r"train\.steps=5 and train\.minutes=1"):
        asked("first", "train.steps=5", train={"minutes": 1})


def test_values_and_overrides_mean_the_same(asked, tmp_path):
    as_values = asked("first", seed=3, optim={"lr": 0.01}, data={"path": tmp_path}, tokenizer="bytes")
    written, _ = load_recipe("first", ["seed=3", "optim.lr=0.01", f"data.path={tmp_path}", "tokenizer=bytes"])
    assert as_values == written == asked("first", "seed=3", "optim.lr=0.01", f"data.path={tmp_path}", "tokenizer=bytes")
    assert asked("first", "seed=3", seed=4).seed == 4


def test_overrides_are_laid_over_a_recipe_object_too(asked):
    recipe, _ = load_recipe("shakespeare_char_cpu")
    assert lengths(asked(recipe, "train.minutes=2", "train.rows=4")) == (None, 2, None)
    assert asked(recipe, "train.rows=4").train.rows == 4
    with pytest.raises(ConfigError, match=r"train\.setps"):
        asked(recipe, "train.setps=4")


@pytest.mark.parametrize("name", ["assistant", "trip.yaml"])
def test_a_journey_is_no_recipe_and_says_so(asked, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trip.yaml").write_text("stages: {one: {kind: train, recipe: first}}\n")
    with pytest.raises(ConfigError, match=f"{name} is a journey of several recipes.*: dougong train {name}"):
        asked(name)
    with pytest.raises(ConfigError, match="one of its stages: first, sft, grpo"):
        asked("assistant")
