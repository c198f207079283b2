"""Runs that no training wrote: whole or not at all."""

import pytest
import torch
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.core.errors import ConfigError, DougongError
from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.models import count
from dougong.recipes.made_run import fill, made_run, name_for, refuse_existing
from dougong.recipes.open_run import open_run
from dougong.train.shadow import tracked


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    recipe = write_recipe(root / "tiny.yaml", write_texts(root / "texts"), model=MODELS["qwen3"],
                          train={"minutes": None, "steps": 2, "rows": 2, "trackers": []}, sample={"prompts": []},
                          evaluate={"tokens": 200, "baselines": False})
    assert dougong("train", recipe, "--run", root / "tiny").code == 0
    return open_run(root / "tiny")


def test_what_was_filled_opens_as_the_run_it_was_made_of(opened, tmp_path):
    with made_run(tmp_path / "made") as run:
        written = fill(run, opened.recipe, opened.recorded, tracked(opened.model), reason="test",
                       tokenizer=opened.tokenizer, step=7)
        assert not (tmp_path / "made").exists()
    made = open_run(tmp_path / "made")
    assert (made.step, made.recipe) == (7, opened.recipe)
    assert made.tokenizer.fingerprint == opened.tokenizer.fingerprint
    ours, theirs = tracked(opened.model), tracked(made.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert written == (made.directory.checkpoint(7) / "model.safetensors").stat().st_size
    model = next(event for event in read_events(made.directory.events) if event["event"] == "model")
    assert model["flops_per_token"] == count.flops_per_token(opened.recipe.model, opened.recipe.row_tokens)


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_nothing(opened, tmp_path, error):
    with pytest.raises(type(error)), made_run(tmp_path / "made") as run:
        opened.tokenizer.save(run.tokenizer)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_kill_left_does_not_come_in(opened, tmp_path):
    left = tmp_path / ".made-writing" / "checkpoints" / "step-000009"
    left.mkdir(parents=True)
    with made_run(tmp_path / "made") as run:
        fill(run, opened.recipe, opened.recorded, tracked(opened.model), reason="test", tokenizer=opened.tokenizer)
    assert [path.name for path in RunDirectory(tmp_path / "made").checkpoints.iterdir()] == ["step-000000"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DougongError, match="file"), made_run(tmp_path / "file" / "made"):
        pass


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(ConfigError, match=r"exists already.*--out"):
        refuse_existing(tmp_path, option="--out")
    refuse_existing(tmp_path / "free", option="--out")


def test_a_name_is_one_that_recipes_take(tmp_path):
    assert name_for(tmp_path / "my model (2)") == "my-model--2-"
