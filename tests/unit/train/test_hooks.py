"""Evaluation, early stopping, samples, events, signals: what happens between steps."""

import os
import signal

import pytest
import torch
from tiny_training import OBJECTIVE, RUNTIME, assert_same, flat, tiny_config, tiny_state

from dougong.core.events import EventLog, read_events
from dougong.core.run import RunDirectory
from dougong.train.checkpoint import (
    Checkpointer,
    best_valid,
    latest_valid,
    load_checkpoint,
    load_model_tensors,
)
from dougong.train.hooks import Evaluate, Hooks, Interrupted, Sample, SaveCheckpoints, stop_on_signals
from dougong.train.loop import fit
from dougong.train.metrics import Reporter, StepMeter


class Watch:
    """A run with the usual hooks over scripted evaluation losses."""

    def __init__(self, tmp_path, losses, *, steps=12, patience=None, log_every=1):
        self.run = RunDirectory(tmp_path)
        self.reporter = Reporter(EventLog(self.run.events))
        self.losses, self.steps = iter(losses), steps
        self.seen = []
        cpu = torch.device("cpu")
        self.hooks = [
            StepMeter(self.reporter, every=log_every, total_steps=steps, device=cpu, flops_per_token=3e3,
                      peak_flops_per_s=1e9),
            Evaluate(self.reporter, self.evaluate, every=2, total_steps=steps, patience=patience),
            Sample(self.reporter, lambda state: [("a", "b"), ("c", str(float(torch.rand(()))))], every=5,
                   total_steps=steps),
            SaveCheckpoints(self.reporter, Checkpointer(self.run), every=5, total_steps=steps)]

    def evaluate(self, state):
        torch.rand(3)
        self.seen.append((state.model.training, state.model.embedding.weight.detach().clone()))
        return {"loss": next(self.losses), "bits_per_byte": 1.5}

    def train(self, state):
        hooks = Hooks(state, self.hooks)
        for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(self.steps)):
            hooks.run(result)
        hooks.finish(state)
        return state

    def events(self, kind):
        return [record for record in read_events(self.run.events) if record["event"] == kind]


def test_watching_does_not_change_training(tmp_path):
    watched = Watch(tmp_path, [3.0] * 9).train(tiny_state(steps=12))
    alone = tiny_state(steps=12)
    list(fit(alone, OBJECTIVE, RUNTIME, tiny_config(12)))
    assert_same(flat(watched), flat(alone))


def test_evaluation_uses_the_average_in_evaluation_mode(tmp_path):
    watch, state = Watch(tmp_path, [3.0] * 9, steps=6), tiny_state(steps=6)
    watch.train(state)
    training, weight = watch.seen[-1]
    assert not training and torch.equal(weight, state.shadow.tensors["embedding.weight"])
    assert not torch.equal(weight, state.model.embedding.weight)
    assert watch.events("evaluation")[0]["weights"] == "ema"


def test_the_best_is_kept_and_a_nan_is_never_the_best(tmp_path):
    watch = Watch(tmp_path, [float("nan"), 3.0, 2.0, 2.5, float("nan"), 2.2])
    state = watch.train(tiny_state(steps=12))
    assert [record["best"] for record in watch.events("evaluation")] == [False, True, True, False, False,
                                                                         False]
    assert state.best == {"loss": 2.0, "step": 6, "waited": 3}
    assert best_valid(watch.run).step == 6 and latest_valid(watch.run).step == 12
    assert {(e["step"], e["reason"]) for e in watch.events("checkpoint")} == {
        (4, "best"), (5, "interval"), (6, "best"), (10, "interval"), (12, "last")}


def test_stopped_during_the_evaluation_that_is_the_best_and_resumed_keeps_that_checkpoint(tmp_path):
    def until_stopped():
        yield from (5.0, 4.0)
        raise Interrupted

    whole = Watch(tmp_path / "whole", [5.0, 4.0, 1.0, 3.0, 3.0, 2.0])
    whole.train(tiny_state(steps=12))
    stopped = Watch(tmp_path / "stopped", until_stopped()).train(tiny_state(steps=12))
    assert (stopped.step, stopped.stop, stopped.best["step"]) == (6, "interrupted", 4)
    resumed, state = Watch(tmp_path / "stopped", [1.0, 3.0, 3.0, 2.0]), tiny_state(steps=12, seed=5)
    load_checkpoint(latest_valid(resumed.run).path, state)
    resumed.train(state)
    assert best_valid(resumed.run).step == state.best["step"] == 6
    assert resumed.run.checkpoint_steps() == whole.run.checkpoint_steps() == [6, 10, 12]
    assert_same(load_model_tensors(best_valid(resumed.run).path, weights="ema"),
                load_model_tensors(best_valid(whole.run).path, weights="ema"))


def test_a_best_checkpoint_that_is_resumed_is_not_written_again(tmp_path):
    Watch(tmp_path, [3.0, 2.0], steps=4).train(tiny_state(steps=12))
    again, state = Watch(tmp_path, [2.5] * 4), tiny_state(steps=12)
    load_checkpoint(best_valid(again.run).path, state)
    again.train(state)
    assert [e["step"] for e in again.events("checkpoint") if e["reason"] == "best"] == [2, 4]


def test_patience_ends_training_and_stays_ended_after_a_resume(tmp_path):
    watch = Watch(tmp_path, [3.0, 2.0, 2.1, 2.2, 1.0], patience=2)
    state = watch.train(tiny_state(steps=12))
    assert state.step == 8 and state.stop == "early stop"
    again = tiny_state(steps=12)
    load_checkpoint(latest_valid(watch.run).path, again)
    assert Watch(tmp_path, [1.0], patience=2).train(again).step == 8


def test_step_events_are_means_over_the_steps_they_sum_up(tmp_path):
    fine, coarse = Watch(tmp_path / "a", [3.0] * 9), Watch(tmp_path / "b", [3.0] * 9, log_every=5)
    for watch in (fine, coarse):
        watch.train(tiny_state(steps=12, spoil={2}))
    each = fine.events("step")
    assert [e["step"] for e in coarse.events("step")] == [5, 10, 12]
    assert fine.events("skip")[0]["step"] == 3 and len(each) == 11
    part = [e for e in each if e["step"] <= 5]
    for name in ("loss", "accuracy"):
        mean = sum(e[name] * e["weight"] for e in part) / sum(e["weight"] for e in part)
        assert coarse.events("step")[0][name] == pytest.approx(mean)
    last = each[-1]
    assert last["tokens"] == 12 * 30 and last["memory_bytes"] > 1e6
    assert last["mfu"] == pytest.approx(last["tokens_per_s"] * 3e3 / 1e9) and last["epoch"] == 1


def test_listeners_get_every_event_as_written(tmp_path):
    heard = []
    reporter = Reporter(EventLog(tmp_path / "events.jsonl"), [heard.append])
    reporter.write("warning", message="x", value=float("inf"))
    assert heard == read_events(tmp_path / "events.jsonl") and heard[0]["value"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path, number, capsys):
    watch, state = Watch(tmp_path, [3.0] * 9), tiny_state(steps=12)
    hooks = Hooks(state, watch.hooks)
    before = signal.getsignal(number)
    with stop_on_signals(state):
        for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(12)):
            hooks.run(result)
            if result.step == 3:
                os.kill(os.getpid(), number)
    hooks.finish(state)
    assert state.stop == "interrupted" and latest_valid(watch.run).step == 3
    assert watch.events("checkpoint")[-1]["reason"] == "interrupt"
    assert "Finishing this step" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_leaves_at_once():
    state = tiny_state()
    with pytest.raises(KeyboardInterrupt), stop_on_signals(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
