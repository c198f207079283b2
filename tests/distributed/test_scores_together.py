"""Processes that each score the whole model by themselves go on as one: the figures are process 0's, so all save and
stop alike, whatever a clock or a rounding has made of the others'."""

import os
import signal

import pytest
import yaml
from processes import run_processes
from tiny_recipe import MODELS

from dougong.adapt import rollouts
from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.recipes import array_scores, experience
from dougong.recipes.experience import ChatSpelling
from dougong.recipes.recipe import load_recipe
from dougong.recipes.train import train_run
from dougong.runtime.processes import process_rank

TIMEOUT_S = 40
LOSSES = [[-0.5, -0.6, -0.7, -0.6, -0.6, -0.6], [-0.9, -0.2, -0.1, -0.2, -0.2, -0.2]]
"""by rank: each evaluation finds the best on one process alone, and patience ends at others"""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOUGONG_CACHE", str(tmp_path_factory.mktemp("scored") / "cache"))
        yield


def practice(path, *, tokens=4000, **train):
    path.write_text(yaml.safe_dump({
        "base": "reversed_addition", "model": {**MODELS["qwen3"], "context": 64, "dropout": 0.0},
        "objective": {"kind": "grpo", "samples": 4, "max_tokens": 6, "reward": "length:3"},
        "evaluate": {"tokens": tokens}, "sample": {"prompts": []}, "layout": {"replicate": 2},
        "data": {"sources": [{"kind": "tasks", "skills": ["copying"], "items": 200, "levels": [1, 2]}],
                 "row_tokens": 64},
        "train": {"minutes": None, "epochs": None, "steps": 6, "rows": 8, "evaluate_every": 1, "checkpoint_every": 100,
                  "trackers": [], **train},
        "runtime": {"device": "cpu", "precision": "fp32", "threads": 1, "compile": False}}))
    return path


def evaluations(run, rank):
    return [(row["step"], row["loss"], row["best"]) for row in _of(run, rank, "evaluation")]


def checkpoints(run, rank):
    return [(row["step"], row["reason"]) for row in _of(run, rank, "checkpoint")]


def _of(run, rank, event):
    return [row for row in read_events(RunDirectory(run).events_of(rank)) if row["event"] == event]


def _train(recipe, path):
    ended = train_run(*load_recipe(str(recipe)), path=path)
    return ended.step, ended.reason


def _told_by_rank(module, name, recipe, path):
    """Trains where `module.name` gives this process's own losses."""
    told, measure = iter(LOSSES[process_rank()]), getattr(module, name)

    def found(*arguments, **more):
        return {**measure(*arguments, **more), "loss": next(told)}

    setattr(module, name, found)
    return _train(recipe, path)


@pytest.mark.parametrize("scored", ["tasks", "arrays"])
def test_what_each_scores_alone_is_the_best_for_all_or_for_none(tmp_path, scored):
    recipe, where = practice(tmp_path / "practice.yaml", patience=2), (experience, "greedy_score")
    if scored == "arrays":
        recipe, where = tmp_path / "line.yaml", (array_scores, "squared_error_on")
        recipe.write_text(yaml.safe_dump({
            "base": "linear_regression", "layout": {"replicate": 2},
            "train": {"steps": 6, "evaluate_every": 1, "checkpoint_every": 100, "patience": 2, "trackers": []},
            "runtime": {"device": "cpu", "threads": 1}}))
    ended = run_processes(2, _told_by_rank, *where, recipe, tmp_path / "run", timeout_s=TIMEOUT_S)
    assert ended == [(5, "early stop")] * 2
    for rank in range(2):
        assert evaluations(tmp_path / "run", rank) == [
            (1, -0.5, True), (2, -0.6, True), (3, -0.7, True), (4, -0.6, False), (5, -0.6, False)]
    assert {step for step, _ in checkpoints(tmp_path / "run", 0)} == {1, 2, 3, 5}


def _replies_of_other_lengths(recipe, path):
    """Trains where process 1 ends every reply with its first token, and batches are of two tasks."""
    rollouts._AT_ONCE = 2
    if process_rank() == 1:
        made = ChatSpelling.__init__

        def with_every_token_a_stop(self, *arguments, **more):
            made(self, *arguments, **more)
            self.stop_ids = frozenset(range(self.vocab_size))

        ChatSpelling.__init__ = with_every_token_a_stop
    return _train(recipe, path)


def test_replies_that_differ_in_length_keep_the_processes_together(tmp_path):
    recipe = practice(tmp_path / "practice.yaml", tokens=8, steps=2)
    ended = run_processes(2, _replies_of_other_lengths, recipe, tmp_path / "run", timeout_s=TIMEOUT_S)
    assert ended == [(2, "done")] * 2
    for rank in range(2):
        told = _of(tmp_path / "run", rank, "evaluation")
        assert [(row["tasks"], row["tokens_per_reply"]) for row in told] == [(2, 6.0)] * 2, rank


def _terminated_while_scoring(recipe, path):
    """Trains where process 1 gets SIGTERM in the second of three batches of the second evaluation."""
    rollouts._AT_ONCE = 2
    write, batches = rollouts.write, []

    def interrupted(model, spelling, tasks, sampling, **more):
        if sampling.temperature == 0:
            batches.append(len(tasks))
            if process_rank() == 1 and len(batches) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        return write(model, spelling, tasks, sampling, **more)

    rollouts.write = interrupted
    return (*_train(recipe, path), batches)


def test_sigterm_during_the_scoring_ends_it_for_all(tmp_path):
    recipe = practice(tmp_path / "practice.yaml", tokens=30)
    whole, stopped = run_processes(2, _terminated_while_scoring, recipe, tmp_path / "run", timeout_s=TIMEOUT_S)
    assert whole == stopped == (2, "interrupted", 5 * [2])
    for rank in range(2):
        assert [step for step, *_ in evaluations(tmp_path / "run", rank)] == [1]
    assert checkpoints(tmp_path / "run", 0)[-1] == (2, "interrupt")
