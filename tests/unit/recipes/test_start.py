"""Beginning from a model that exists."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_recipe import dougong, write_recipe, write_texts

from dougong import api
from dougong.core.config import replace
from dougong.core.errors import CheckpointError
from dougong.core.run import RunDirectory
from dougong.data.walk import Skipped, find
from dougong.recipes.derive import resolve
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import StartConfig, load_recipe, recipe_from_run
from dougong.recipes.start import Weights, begin, check_start, fingerprint, read_weights
from dougong.runtime.device import be_deterministic
from dougong.train.shadow import tracked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    recipe = write_recipe(root / "tiny.yaml", write_texts(root / "texts"))
    assert dougong("train", recipe, "--run", root / "base").code == 0
    return root / "base"


def more(base, path, *arguments):
    recipe = write_recipe(base.parent / "more.yaml", base.parent / "texts", model=None, tokenizer=None)
    values = yaml.safe_load(recipe.read_text())
    del values["model"], values["tokenizer"]
    values["train"]["ema"] = None
    recipe.write_text(yaml.safe_dump(values))
    return dougong("train", recipe, "--model", base, "--run", path, *arguments)


def test_a_run_that_begins_from_another_has_its_shape_its_tokenizer_and_learns_on(base, tmp_path):
    done = more(base, tmp_path / "more", "--json", "optim.lr=1e-30", "optim.adamw_lr=1e-30")
    assert done.code == 0, done.err
    (first, _), (second, resolved) = (recipe_from_run(RunDirectory(path).recipe) for path in (base, tmp_path / "more"))
    assert second.model == first.model
    assert second.start.path == str(base)
    before, after = tracked(open_run(base).model), tracked(open_run(tmp_path / "more").model)
    assert resolved["start_fingerprint"] == fingerprint(before)
    for name, tensor in before.items():     # at a rate of zero nothing moved
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


def test_a_run_keeps_the_tokenizer_that_it_was_given(base, tmp_path):
    """As a draft for another model is trained: with that one's tokenizer, which may be moved or made anew."""
    shutil.copytree(base / "tokenizer", tmp_path / "theirs")
    done = dougong("train", base.parent / "tiny.yaml", "--run", tmp_path / "run", "train.steps=4",
                   f"tokenizer={{kind: file, path: {tmp_path / 'theirs'}}}")
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "theirs")
    assert dougong("eval", tmp_path / "run").code == 0
    events = tmp_path / "run" / "events.jsonl"
    kept = [line for line in events.read_text().splitlines() if json.loads(line)["event"] not in ("end", "result")]
    events.write_text("\n".join(kept) + "\n")
    again = dougong("train", "--resume", "--run", tmp_path / "run")
    assert again.code == 0, again.err


def test_what_the_command_line_says_of_the_model_is_laid_over_that_of_the_start(base):
    recipe, _ = load_recipe("first", [f"start.path={base}", "model.dropout=0.25"])
    assert (recipe.model.kind, recipe.model.dim, recipe.model.dropout) == ("nano", 32, 0.25)
    assert recipe.size is None and recipe.tokenizer.path == str(base / "tokenizer")


def test_a_start_given_in_python_brings_its_shape_and_its_tokenizer(base, monkeypatch):
    told = []
    monkeypatch.setattr(api, "train_run", lambda asked, *_, **__: told.append(asked) or SimpleNamespace(
        directory=SimpleNamespace(report=None)))
    monkeypatch.setattr(api, "write_report", lambda *_: None)
    api.train("first", "model.dropout=0.25", start={"path": base})
    api.train(load_recipe("first")[0], start={"path": base}, model={"dropout": 0.25})
    written, _ = load_recipe("first", [f"start.path={base}", "model.dropout=0.25"])
    assert told == [written, written] and written.model.dim == 32


def test_a_run_is_scored_and_gone_on_with_from_another_folder(base, tmp_path, monkeypatch):
    """Its data are where they were, however they were named."""
    (tmp_path / "elsewhere").mkdir()
    values = yaml.safe_load((base.parent / "tiny.yaml").read_text())
    found = []
    for name, data in [("folder", {"path": "texts"}), ("glob", {"path": "texts/*.txt"}),
                       ("sources", {"sources": [{"kind": "files", "path": "texts"}, {"kind": "python"}]})]:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "data": data}))
        monkeypatch.chdir(base.parent)
        here, _ = resolve(load_recipe(str(tmp_path / f"{name}.yaml"))[0])
        monkeypatch.chdir(tmp_path / "elsewhere")
        found.append(here.data.path or here.data.sources[0].path)
        list(find(found[-1], Skipped()))
    assert found == [f"{base.parent}/texts", f"{base.parent}/texts/*.txt", f"{base.parent}/texts"]
    monkeypatch.chdir(base.parent)
    assert resolve(load_recipe("first", ["data.path=textz"])[0])[0].data.path == "textz"    # as it was written
    done = dougong("train", tmp_path / "folder.yaml", "--run", tmp_path / "run", "train.steps=4")
    assert done.code == 0, done.err
    expected = recipe_from_run(RunDirectory(base).recipe)[1]["data_fingerprint"]
    assert recipe_from_run(RunDirectory(tmp_path / "run").recipe)[1]["data_fingerprint"] == expected
    monkeypatch.chdir(tmp_path / "elsewhere")
    scored = dougong("eval", tmp_path / "run")
    assert scored.code == 0, scored.err


def test_new_tokens_get_rows_around_the_mean_row_and_the_old_rows_stay(base):
    weights = read_weights(StartConfig(path=str(base)))
    config = load_recipe("first", [f"start.path={base}"])[0].model
    model = replace(config, vocab_size=config.vocab_size + 5).build()
    begin(model, weights, seed=3)
    table, old = model.stem.tokens.weight, weights.tensors["stem.tokens.weight"]
    torch.testing.assert_close(table[:len(old)], old, rtol=0, atol=0)
    new = table[len(old):]
    assert len(new) == 5 and len(torch.unique(new, dim=0)) == 5
    assert ((new - old.mean(0)).abs() < old.std(0)).all()


def test_reading_the_weights_of_a_start_leaves_determinism_as_it_was(base):
    be_deterministic(True)
    try:
        read_weights(StartConfig(path=str(base)))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        be_deterministic(False)


def test_a_start_that_changed_is_refused(base, tmp_path):
    weights = read_weights(StartConfig(path=str(base)))
    check_start({"start_fingerprint": weights.fingerprint}, weights, tmp_path)
    with pytest.raises(CheckpointError, match="has changed since"):
        check_start({"start_fingerprint": "0" * 64}, Weights(weights.tensors, weights.fingerprint), tmp_path)


def test_a_recipe_without_a_model_says_how_to_name_one(base):
    recipe = base.parent / "none.yaml"
    recipe.write_text(yaml.safe_dump({"base": "first", "model": None, "tokenizer": None, "size": None}))
    refused = dougong("show", recipe)
    assert refused.code == 2 and "--model RUN" in refused.err
