"""A journey's stages, each beginning from the run before."""

import json

import pytest
import yaml
from tiny_recipe import dougong, write_recipe, write_texts

from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.files import lock
from dougong.core.run import RunDirectory
from dougong.recipes.journey import TrainStage, last_run, load_journey
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import recipe_from_run


@pytest.fixture
def journey(tmp_path):
    texts = write_texts(tmp_path / "texts")
    first = write_recipe(tmp_path / "first.yaml", texts)
    second = write_recipe(tmp_path / "second.yaml", texts)
    values = yaml.safe_load(second.read_text())
    del values["model"], values["tokenizer"]
    values["train"]["ema"] = None
    second.write_text(yaml.safe_dump(values | {"model": None, "tokenizer": None}))
    path = tmp_path / "trip.yaml"
    path.write_text(yaml.safe_dump({"name": "trip", "stages": {
        "pretrain": {"kind": "train", "recipe": str(first)},
        "more": {"kind": "train", "recipe": str(second), "changes": {"train": {"steps": 8}}}}}, sort_keys=False))
    return path


def test_each_stage_begins_from_the_run_before_and_the_directory_opens_as_its_last_run(journey, tmp_path):
    done = dougong("train", journey, "--run", tmp_path / "trip", "pretrain.train.steps=6", "--json")
    assert done.code == 0, done.err
    assert done.json["reason"] == "done" and list(done.json["stages"]) == ["pretrain", "more"]
    first, second = (recipe_from_run(RunDirectory(tmp_path / "trip" / name).recipe)[0]
                     for name in ("1-pretrain", "2-more"))
    assert first.train.steps == 6 and second.train.steps == 8
    assert second.start.path == str(tmp_path / "trip" / "1-pretrain")
    assert open_run(tmp_path / "trip").directory.path == tmp_path / "trip" / "2-more"


def test_going_on_passes_over_what_is_done(journey, tmp_path):
    assert dougong("train", journey, "--run", tmp_path / "trip").code == 0
    before = (tmp_path / "trip" / "1-pretrain" / "events.jsonl").read_bytes()
    events = tmp_path / "trip" / "2-more" / "events.jsonl"
    kept = [line for line in events.read_text().splitlines() if json.loads(line)["event"] not in ("end", "result")]
    events.write_text("\n".join(kept) + "\n")                   # as if it had been killed at its end
    again = dougong("train", "--resume", "--run", tmp_path / "trip", "--json")
    assert again.code == 0, again.err
    assert again.json["reason"] == "done"
    assert (tmp_path / "trip" / "1-pretrain" / "events.jsonl").read_bytes() == before
    assert '"end"' in events.read_text()


def test_a_journey_that_was_moved_goes_on_where_it_lies(journey, tmp_path):
    assert dougong("train", journey, "--run", tmp_path / "trip").code == 0
    events = tmp_path / "trip" / "2-more" / "events.jsonl"
    kept = [line for line in events.read_text().splitlines() if json.loads(line)["event"] not in ("end", "result")]
    events.write_text("\n".join(kept) + "\n")                   # as if it had been killed at its end
    (tmp_path / "trip").rename(tmp_path / "elsewhere")
    again = dougong("train", "--resume", "--run", tmp_path / "elsewhere", "--json")
    assert again.code == 0 and again.json["reason"] == "done", again.err


def test_an_unknown_stage_is_refused_with_the_nearest_name(journey):
    refused = dougong("train", journey, "pretrian.train.steps=2")
    assert refused.code == 2 and "pretrain" in refused.err


def test_a_stage_may_be_left_out(journey):
    assert list(load_journey(str(journey), ["more=null"]).stages) == ["pretrain"]


def test_nobody_else_goes_the_same_way_meanwhile_and_a_stage_begins_where_the_one_before_ended(journey, tmp_path,
                                                                                             monkeypatch):
    trip, seen = tmp_path / "trip", []

    def run(stage, before, path, progress):
        with pytest.raises(CheckpointError, match="in use"), lock(trip / ".lock", owner="another"):
            pass
        seen.append(before)
        return tmp_path / "elsewhere", "interrupted"

    monkeypatch.setattr(TrainStage, "run", run)
    assert dougong("train", journey, "--run", trip).code == 0
    with lock(trip / ".lock", owner="another"):
        refused = dougong("train", "--resume", "--run", trip)
    assert refused.code == 2 and "in use by another" in refused.err
    monkeypatch.setattr(TrainStage, "run", lambda *given: (run(*given)[0], "done"))
    monkeypatch.setattr("dougong.recipes.judge.judge_journey", lambda *_, **__: None)
    assert dougong("train", "--resume", "--run", trip).code == 0
    assert seen == [None, None, tmp_path / "elsewhere"]


@pytest.mark.parametrize(("content", "says"), [
    ("stages:\n", "stages"), ("stages: [a, b]\n", "stages"), ("stages: {}\n", "stages"),
    ("base: [1]\nstages: {}\n", "'[1]'"),
    ("base: assistant\nstages: 3\n", "stages"), ("stages: {a: [1]}\n", "stage"), ("base: [1]\n", "base"),
    ("stages: {a: {kind: train, recipe: first, changes: 3}}\n", "changes")])
def test_a_journey_file_that_is_none(tmp_path, content, says):
    (tmp_path / "trip.yaml").write_text(content)
    for overrides in ([], ["a.train.steps=3"]):
        told = dougong("show", tmp_path / "trip.yaml", *overrides)
        assert told.code == 2 and "error:" in told.err and says in told.err


def test_a_stage_given_by_its_kind_alone_takes_changes(tmp_path):
    (tmp_path / "trip.yaml").write_text("stages: {first: {kind: train, recipe: first}, small: compress}\n")
    assert load_journey(str(tmp_path / "trip.yaml"), ["small.to=int4"]).stages["small"].to == "int4"


@pytest.mark.parametrize(("stage", "says"), [
    ("more: {train: {mintues: 3}}", ["stage more", "train.mintues", "'minutes'"]),
    ("more: {start: {chekpoint: last}}", ["stage more", "start.chekpoint", "'checkpoint'"]),
    ("small: {kind: compress, method: gptqq}", ["stage small", "'gptqq'", "'gptq'"]),
    ("last: {kind: train, recipe: frist}", ["stage last", "'frist'", "'first'"])])
def test_a_mistake_in_a_later_stage_is_found_before_the_first_trains(journey, stage, says):
    name, change = next(iter(yaml.safe_load(stage).items()))
    values = yaml.safe_load(journey.read_text())
    values["stages"][name] = {**values["stages"].get(name, {}), **({"changes": change} if name == "more" else change)}
    journey.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError) as refused:
        load_journey(str(journey))
    assert all(word in str(refused.value) for word in says), str(refused.value)


def test_a_later_stage_may_change_a_model_that_is_still_to_be_made(tmp_path):
    (tmp_path / "trip.yaml").write_text("base: assistant\nstages: {sft: {model: {dropout: 0.1}, "
                                        "start: {checkpoint: last}}}\n")
    changes = load_journey(str(tmp_path / "trip.yaml")).stages["sft"].changes
    assert changes["model"] == {"dropout": 0.1} and changes["start"] == {"checkpoint": "last"}


def test_steps_of_a_stage_take_back_its_minutes():
    train = load_journey("assistant", ["sft.train.steps=5"]).stages["sft"].changes["train"]
    assert train["steps"] == 5 and train["minutes"] is None


def test_a_repeated_key_in_a_journey_is_refused(tmp_path):
    (tmp_path / "trip.yaml").write_text("base: assistant\nstages: {}\nstages: {sft: null}\n")
    told = dougong("show", tmp_path / "trip.yaml")
    assert told.code == 2 and "line 3: the key 'stages' stands here again" in told.err


@pytest.mark.parametrize(("content", "says"), [
    (b"name: trip\nname: again\n", "line 2: the key 'name' stands here again"), (b"name: \xff\n", "is not YAML"),
    (b"[1]\n", "should hold keys and values"), (b"name: trip\nstage: {}\n", "'stage'")])
def test_a_begun_journey_whose_file_is_damaged_says_so(tmp_path, content, says):
    (tmp_path / "journey.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"journey in .* cannot be read") as told:
        last_run(tmp_path)
    assert says in str(told.value)
    refused = dougong("train", "--resume", "--run", tmp_path)
    assert refused.code == 2 and says in refused.err and "Traceback" not in refused.err


def test_a_file_that_cannot_be_read_is_no_journey_and_told_as_such(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "trip.yaml").write_text("stages: {}\n")
    monkeypatch.setattr("pathlib.Path.read_text", fails)
    told = dougong("show", tmp_path / "trip.yaml")
    assert told.code == 2 and "trip.yaml cannot be read: Permission denied" in told.err
