"""`runtime.float8=true` as a person uses it."""

import pytest
import torch
from tiny_recipe import dougong, write_recipe, write_texts

from dougong.core.errors import ConfigError
from dougong.core.events import read_events
from dougong.nn.float8 import float8_product
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import check_float8, resolve
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import load_recipe

TRAIN = {"minutes": None, "steps": 6, "rows": 8, "micro_rows": 4, "evaluate_every": 3, "sample_every": 6,
         "checkpoint_every": 3, "trackers": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("float8")
    write_texts(path / "texts")
    return path


@pytest.fixture(scope="module")
def runs(folder):
    """The same six steps with and without."""
    recipe = write_recipe(folder / "tiny.yaml", folder / "texts", train=TRAIN)
    for name, given in (("with", ["runtime.float8=true"]), ("without", [])):
        done = dougong("train", recipe, "--run", folder / name, *given)
        assert done.code == 0, done.err
    return folder


def weights(run):
    return open_run(run).model.state_dict()


def test_it_trains_otherwise_and_opens_as_a_usual_model(runs):
    with_it, without = open_run(runs / "with"), open_run(runs / "without")
    assert with_it.recipe.runtime.float8
    assert all(getattr(part, "multiply", None) is not float8_product for part in with_it.model.modules())
    mine, theirs = with_it.model.state_dict(), without.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)
    for name, value in mine.items():
        assert torch.isfinite(value).all()
        if "stack" in name and value.ndim == 2:
            assert (value - theirs[name]).norm() < 0.2 * theirs[name].norm(), name


def test_stopped_and_resumed_is_the_same_to_the_last_bit(runs, monkeypatch):
    recipe = runs / "tiny.yaml"
    begun = dougong("train", recipe, "--run", runs / "stopped", "runtime.float8=true")
    assert begun.code == 0
    for step in (4, 5, 6):
        for path in (runs / "stopped" / "checkpoints").glob(f"step-{step:06d}"):
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    events = runs / "stopped" / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(keepends=True)
                              if '"event": "end"' not in line and '"event":"end"' not in line))
    resumed = dougong("train", "--resume", "--run", runs / "stopped")
    assert resumed.code == 0, resumed.err
    assert [event["resumed_from"] for event in read_events(events) if event["event"] == "start"][-1] == "step-000003"
    mine, theirs = weights(runs / "stopped"), weights(runs / "with")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("given", "reason"), [
    (["adapt.kind=qat"], "adapt.kind=qat"),
    (["objective.kind=classify_text"], "objective.kind=classify_text"),
])
def test_where_it_does_not_go_is_said_before_any_data_are_read(folder, given, reason):
    recipe, _ = load_recipe(str(write_recipe(folder / "asked.yaml", folder / "nothing-here")),
                            ["runtime.float8=true", *given])
    with pytest.raises(ConfigError, match=reason):
        resolve(recipe)


def test_a_device_without_it_is_refused():
    recipe, _ = load_recipe("first", [])
    check_float8(recipe, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"not on mps.\nTry runtime.float8=false"):
        check_float8(recipe, torch.device("mps"))


def test_all_layers_of_an_assembled_model_have_it(folder):
    recipe, _ = load_recipe(str(write_recipe(folder / "built.yaml", folder / "texts", train=TRAIN)),
                            ["runtime.float8=true"])
    recipe, _ = resolve(recipe)
    built = assemble(recipe, prepare_data(recipe))
    found = {name.rpartition(".")[2] for name, part in built.state.model.named_modules()
             if getattr(part, "multiply", None) is float8_product}
    assert found == {"query", "key", "value", "output", "up", "down"}
