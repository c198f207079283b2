"""`dougong train --resume` takes no changes, and what the user wrote is printed as it was written. Trains nothing."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_recipe import dougong

from dougong.cli import train
from dougong.core.config import dump_yaml
from dougong.recipes import journey

HERE = ["runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1"]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A journey that has begun no stage, in a folder whose `runs` is looked at; the stages that would run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trip.yaml").write_text("name: alps\nstages: {pretrain: {kind: train, recipe: first}}\n")
    monkeypatch.setattr(journey.TrainStage, "run", lambda *_: (Path("nowhere"), "interrupted"))
    folder = tmp_path / "runs" / "alps"
    folder.mkdir(parents=True)
    (folder / "journey.yaml").write_text(dump_yaml(journey.load_journey("trip.yaml")))
    return folder


@pytest.mark.parametrize("change", ["pretrain.train.steps=500", "nonsense"])
def test_a_journey_that_goes_on_takes_no_changes(begun, change):
    refused = dougong("train", change, "--resume", "--run", begun)
    assert refused.code == 2 and repr(change) in refused.err and "--resume continues" in refused.err
    assert dougong("train", "--resume", "--run", begun).code == 0


def test_a_file_is_gone_on_with_under_the_name_that_it_gives(begun):
    assert "Stopped in stage pretrain" in dougong("train", "trip.yaml", "--resume").out
    Path("mine.yaml").write_text("base: first\nname: hers\n")
    refused = dougong("train", "mine.yaml", "--resume")
    assert refused.code == 2 and "no run at runs/hers" in refused.err


def test_what_the_user_wrote_is_no_markup():
    shown = dougong("show", "first", *HERE, "data.path=t/[a-z]", 'sample.prompts=["[INST]hi[/INST]"]')
    assert shown.code == 0, shown.err
    changed = shown.out.partition("changed from first")[2]
    assert "t/[a-z]" in changed and "[INST]hi[/INST]" in changed


def test_a_runs_name_is_no_markup(tmp_path, monkeypatch):
    monkeypatch.setattr("dougong.report.write_report", lambda *_: None)
    directory = SimpleNamespace(path=tmp_path / "[b]x", report=tmp_path / "[b]x" / "report.html")
    out = Console(file=io.StringIO(), width=1000)
    for reason in ("interrupted", "done"):
        train._summary(SimpleNamespace(directory=directory, reason=reason, step=3, result=None, was_done=False,
                                       is_language_model=True, to_dict=dict), out)
    assert out.file.getvalue().count("[b]x") == 5


def test_a_run_that_is_done_says_how_to_go_on_from_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("dougong.report.write_report", lambda *_: None)
    directory = SimpleNamespace(path=tmp_path / "[b]x", report=tmp_path / "report.html")
    out = Console(file=io.StringIO(), width=40)
    train._summary(SimpleNamespace(directory=directory, reason="done", step=3, result=None, was_done=True,
                                   is_language_model=True, to_dict=dict), out)
    assert f"go on from its weights: dougong train RECIPE --model '{directory.path}' …" in out.file.getvalue()


@pytest.mark.parametrize("command", [["plan"], ["data", "inspect"], ["data", "prepare"]])
def test_what_takes_one_recipe_says_that_a_journey_has_several(command):
    refused = dougong(*command, "assistant")
    assert refused.code == 2 and "assistant is a journey of several recipes" in refused.err
    assert "dougong train assistant" in refused.err and "stages: first, sft, grpo" in refused.err
