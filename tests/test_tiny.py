"""The whole life of a run in seconds, through the real commands: train, stop, resume, evaluate, generate, report.

A run that was stopped, or killed, and resumed is the run that never was, bit for bit: dropout, moving average, Muon's
and AdamW's state, the loader's place and the random numbers are all in play.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import STEPS, dougong, write_recipe, write_texts

from dougong.core.events import last_per_step, read_events
from dougong.core.run import RunDirectory

TIMED = {"time", "attempt", "elapsed_s", "tokens_per_s", "seconds", "mfu", "memory_bytes", "phases"}
STOPPED_AT = STEPS // 2 - 1   # neither an evaluation nor a checkpoint is due


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    cache, os.environ["DOUGONG_CACHE"] = os.environ.get("DOUGONG_CACHE"), str(folder / "cache")
    write_recipe(folder / "tiny.yaml", write_texts(folder / "texts"))
    yield folder
    os.environ.pop("DOUGONG_CACHE")
    if cache is not None:
        os.environ["DOUGONG_CACHE"] = cache


@pytest.fixture(scope="module")
def whole(folder):
    trained = dougong("train", folder / "tiny.yaml", "--run", folder / "whole", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["reason"] == "done" and trained.json["step"] == STEPS
    return RunDirectory(folder / "whole")


def stopping_at(step, number):
    """`fit` whose reader is sent a signal while it holds the result of `step`."""
    from dougong.train.loop import fit

    def stopped(*arguments, **named):
        for result in fit(*arguments, **named):
            if result.step == step:
                os.kill(os.getpid(), number)
            yield result

    return stopped


def story(run):
    """Steps, evaluations and samples without what depends on the clock."""
    return sorted(({key: value for key, value in event.items() if key not in TIMED}
                   for event in last_per_step(read_events(run.events))
                   if event["event"] in ("step", "evaluation", "sample")), key=lambda e: (e["step"], e["event"]))


def assert_same_end(run, other, step):
    """The last checkpoints hold equal tensors and, the clock aside, equal values; so do the events."""
    for name in ("model", "optimizer", "shadow", "rng"):
        a, b = (load_file(r.checkpoint(step) / f"{name}.safetensors") for r in (run, other))
        assert a.keys() == b.keys() and a, name
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), f"{name}: {key}"
            assert not a[key].is_floating_point() or bool(a[key].isfinite().all()), f"{name}: {key}"
    a, b = (json.loads((r.checkpoint(step) / "state.json").read_text()) for r in (run, other))
    for state in (a, b):
        state.pop("elapsed_s")
        state["window"].pop("seconds", None)
        state["rng"].pop("python")   # beartype's shape checks, on in tests alone, draw from it
    assert a == b
    assert story(run) == story(other)


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(folder, whole, monkeypatch):
    torn = RunDirectory(folder / "torn")
    with monkeypatch.context() as patched:
        patched.setattr("dougong.recipes.train.fit", stopping_at(STOPPED_AT, signal.SIGTERM))
        stopped = dougong("train", folder / "tiny.yaml", "--run", torn.path, "--json")
    assert stopped.code == 0 and stopped.json["reason"] == "interrupted" and stopped.json["step"] == STOPPED_AT
    assert f"dougong train --resume --run {torn.path}" in stopped.err.replace("\n", "")
    resumed = dougong("train", "--resume", "--run", torn.path, "--json")
    assert resumed.code == 0 and resumed.json["reason"] == "done"
    assert_same_end(whole, torn, STEPS)
    results = [next(e for e in read_events(run.events) if e["event"] == "result") for run in (whole, torn)]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
    assert [e["step"] for e in read_events(torn.events) if e["event"] == "start"] == [0, STOPPED_AT]


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(folder):
    """`kill -9` of a real process, somewhere after its first checkpoint."""
    steps, runs = 120, [RunDirectory(folder / name) for name in ("unkilled", "killed")]
    recipe = [folder / "tiny.yaml", f"train.steps={steps}", "train.checkpoint_every=20", "train.evaluate_every=50",
              "train.sample_every=100", "evaluate.baselines=false"]
    assert dougong("train", *recipe, "--run", runs[0].path).code == 0
    process = subprocess.Popen([sys.executable, "-m", "dougong", "train", *map(str, recipe), "--run",
                                str(runs[1].path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(e["event"] == "step" and e["step"] >= 30 for e in read_events(runs[1].events)):
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the process had ended before it was killed"
    assert not any(e["event"] in ("end", "result") for e in read_events(runs[1].events))
    resumed = dougong("train", "--resume", "--run", runs[1].path, "--json")
    assert resumed.code == 0, resumed.err
    starts = [e["step"] for e in read_events(runs[1].events) if e["event"] == "start"]
    assert len(starts) == 2 and 20 <= starts[1] < steps, "it did not go on from a checkpoint"
    elapsed = [e["elapsed_s"] for e in read_events(runs[1].events) if e["event"] == "step"]
    assert elapsed == sorted(elapsed), "steps that the kill undid took their time too"
    assert_same_end(*runs, steps)


def test_every_verb_works_on_the_run(whole):
    scored = dougong("eval", whole.path, "--json")
    assert scored.code == 0 and scored.json["split"] == "test" and scored.json["weights"] == "ema"
    written = next(e for e in read_events(whole.events) if e["event"] == "result")
    assert scored.json["bits_per_byte"] == written["bits_per_byte"] < 8.0
    assert {row["name"] for row in scored.json["baselines"]} == {"byte 5-gram", "xz -9 per document"}
    made = [dougong("generate", whole.path, "ab", "--tokens", 12, "--seed", 3, "--json") for _ in range(2)]
    assert made[0].code == 0 and made[0].json["generations"][0]["text"] == made[1].json["generations"][0]["text"]
    assert 1 <= len(made[0].json["generations"][0]["tokens"]) <= 12
    page = dougong("report", whole.path, "--json")
    assert page.code == 0 and Path(page.json["report"]).read_text(encoding="utf-8").lstrip().startswith("<!")


def test_resuming_a_finished_run_says_so_and_changes_nothing(whole):
    def contents():
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(whole.path.rglob("*")) if p.is_file()}

    before = contents()
    again = dougong("train", "--resume", "--run", whole.path, "--json")
    assert again.code == 0 and again.json["reason"] == "done" and "already finished" in again.err
    assert contents() == before


def test_a_second_run_of_a_name_takes_the_next_number(folder, whole):
    before = whole.events.read_bytes()
    second = dougong("train", folder / "tiny.yaml", "train.steps=2", "--run", whole.path, "--json")
    assert second.code == 0 and second.json["run"] == f"{whole.path}-2"
    assert whole.events.read_bytes() == before


def test_training_has_learned_something(whole):
    losses = [e["loss"] for e in read_events(whole.events) if e["event"] == "step"]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5


def test_the_peak_that_is_told_is_that_of_training_not_of_the_score_after_it(tmp_path, monkeypatch):
    from dougong.recipes import train

    held, score = [100], train._score_final
    monkeypatch.setattr(train, "peak_memory_bytes", lambda device: held[-1])
    monkeypatch.setattr(train, "_score_final", lambda *a: (held.append(900), score(*a))[1])
    recipe = write_recipe(tmp_path / "r.yaml", write_texts(tmp_path / "texts", documents=20))
    assert dougong("train", recipe, "--run", tmp_path / "run", "train.steps=2").code == 0
    end = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "end"]
    assert held == [100, 900] and [event["peak_memory_bytes"] for event in end] == [100]
