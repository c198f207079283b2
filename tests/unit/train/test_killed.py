"""`kill -9` at random moments: the run resumed until it ends is the run never killed, bit for bit."""

import os
import random
import signal
import time

import pytest
import torch
from tiny_training import OBJECTIVE, RUNTIME, assert_same, flat, tiny_config, tiny_state

from dougong.core.events import EventLog, last_per_step, read_events
from dougong.core.run import RunDirectory
from dougong.train.checkpoint import Checkpointer, latest_valid, load_checkpoint
from dougong.train.hooks import Evaluate, Hooks, SaveCheckpoints
from dougong.train.loop import fit
from dougong.train.metrics import Reporter, StepMeter

STEPS = 40
TIMED = {"time", "attempt", "elapsed_s", "tokens_per_s", "seconds", "mfu", "memory_bytes", "phases"}


def work(run, pause_s=0.0):
    """What a recipe does: resume from the newest whole checkpoint, train, watch, save."""
    state = tiny_state(steps=STEPS)
    if (found := latest_valid(run)).path:
        load_checkpoint(found.path, state)
    reporter = Reporter(EventLog(run.events))
    checkpointer = Checkpointer(run, keep_last=2)
    hooks = Hooks(state, [
        StepMeter(reporter, every=3, total_steps=STEPS, device=torch.device("cpu")),
        Evaluate(reporter, lambda state: {"loss": float(state.model(torch.randint(11, (4, 5))).std())},
                 every=7,
                 total_steps=STEPS),
        SaveCheckpoints(reporter, checkpointer, every=2, total_steps=STEPS)])
    for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(STEPS)):
        hooks.run(result)
        time.sleep(pause_s)
    hooks.finish(state)
    return state


def killed(run, after_s, pause_s):
    """Runs `work` in a child process and kills it; whether it was still at work."""
    child = os.fork()
    if child == 0:
        try:
            work(run, pause_s)
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def story(run):
    """Step and evaluation events without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMED}
            for record in last_per_step(read_events(run.events))
            if record["event"] in ("step", "evaluation")]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path):
    whole, torn = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "torn")
    reference = work(whole)
    random.seed(1)
    begin, kills, moments, longest_s = time.monotonic(), 0, set(), 0.25
    while (kills < 8 or len(moments) < 2) and time.monotonic() - begin < 60:
        kills += killed(torn, random.uniform(0.02, longest_s), pause_s=0.01)
        before, moments = len(moments), moments | {latest_valid(torn).step}
        if STEPS in moments:        # it lived to its end, and nothing is left to kill: another, in shorter lives
            torn, kills, moments, longest_s = RunDirectory(f"{torn.path}-again"), 0, set(), longest_s / 2
        elif len(moments) == before:
            longest_s *= 1.5        # a busy machine needs longer lives to get anywhere
    assert kills >= 3 and len(moments) >= 2, "the kills fell where nothing was going on"
    resumed = work(torn)
    assert resumed.step == STEPS
    assert_same(flat(reference), flat(resumed))
    told = sorted(story(torn), key=lambda record: (record["step"], record["event"]))
    assert told == sorted(story(whole), key=lambda record: (record["step"], record["event"]))
