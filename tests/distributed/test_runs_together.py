"""Whole runs in several processes: what is evaluated on the way, and how a run begun by one process goes on."""

import shutil

import pytest
import yaml
from processes import run_processes
from tiny_recipe import MODELS, write_recipe, write_texts

from dougong.api import resume_run
from dougong.core.events import read_events
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe
from dougong.recipes.train import train_run
from dougong.runtime.layout import LayoutConfig

MODEL = {**MODELS["qwen3"], "context": 64, "dropout": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))


def _train(recipe, path, layout):
    train_run(*load_recipe(str(recipe), changes={"layout": layout}), path=path)


def _resume(path, layout):
    resume_run(path, layout=layout)


def _of(path, event):
    return [one for one in read_events(path / "events.jsonl") if one["event"] == event]


@pytest.mark.parametrize("layout", [{"replicate": 2}, {"shard": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_conversations_are_evaluated_by_all_as_by_one(tmp_path, layout):
    recipe = tmp_path / "sums.yaml"
    recipe.write_text(yaml.safe_dump({
        "base": "reversed_addition", "model": MODEL, "evaluate": {"tokens": 2000}, "sample": {"prompts": []},
        "data": {"sources": [{"kind": "tasks", "skills": ["copying"], "items": 200, "levels": [1, 2]}],
                 "row_tokens": 64},
        "train": {"minutes": None, "epochs": None, "steps": 4, "rows": 8, "evaluate_every": 2, "checkpoint_every": 4,
                  "trackers": []},
        "runtime": {"device": "cpu", "precision": "fp32", "threads": 1, "compile": False}}))
    _train(recipe, tmp_path / "one", {})
    run_processes(2, _train, recipe, tmp_path / "two", layout)
    one, two = _of(tmp_path / "one", "evaluation"), _of(tmp_path / "two", "evaluation")
    assert [row["step"] for row in one] == [row["step"] for row in two] == [2, 4]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["weight"] == a["weight"] > 0


def test_a_run_begun_by_one_process_goes_on_as_a_pipeline(tmp_path):
    recipe = write_recipe(tmp_path / "text.yaml", write_texts(tmp_path / "texts"), model=MODEL, train={
        "minutes": None, "steps": 4, "rows": 8, "micro_rows": 8, "checkpoint_every": 2, "evaluate_every": 4,
        "sample_every": 4, "trackers": [], "keep_every": 2})
    _train(recipe, tmp_path / "run", {})
    expected = _of(tmp_path / "run", "evaluation")[-1]
    _stopped_at_2(tmp_path / "run")
    run_processes(2, _resume, tmp_path / "run", LayoutConfig(pipeline=2))
    assert len(_of(tmp_path / "run", "start")) == 2 and _of(tmp_path / "run", "end")[-1]["step"] == 4
    assert _of(tmp_path / "run", "evaluation")[-1]["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def _stopped_at_2(run):
    """As if it had been killed after its second step."""
    shutil.rmtree(run / "checkpoints" / "step-000004")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if '"event": "end"' not in line))


def _chosen(recipe):
    """The layout where each machine would have chosen another."""
    import dougong.plan
    from dougong.recipes.launch import lay_out
    from dougong.runtime.processes import process_rank

    own = [LayoutConfig(replicate=2), LayoutConfig(shard=2)][process_rank()]
    dougong.plan.choose_layout = lambda *_, **__: (own, "what fits here")
    return lay_out(recipe)[0]


def test_an_automatic_layout_is_that_of_process_0_everywhere():
    recipe = resolve(load_recipe("first", ["layout=auto", "train.rows=8", "size=500K", "runtime.threads=1"])[0])[0]
    assert run_processes(2, _chosen, recipe) == [LayoutConfig(replicate=2)] * 2
