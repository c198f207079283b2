"""SIGTERM, at the moments at which it comes badly: the run stops in good order and goes on as if it had not."""

import signal
from functools import partial

import faults
import pytest
from ends import RunDirectory, assert_same_end, starts
from lives import Life

from dougong.core.events import read_events

TERM = partial(faults.stop_with, signal.SIGTERM)


def stop_and_go_on(lab, reference, name, fault):
    """Stopped by SIGTERM with exit code 0, resumed, equal to the reference; the step at which it stopped."""
    run = RunDirectory(lab / name)
    stopped = Life(lab, "train", lab / "tiny.yaml", "--run", run.path, fault=fault).end()
    assert stopped.code == 0 and "Stopped at step" in stopped.out, stopped
    assert not run.report.exists() or starts(run) == [0]
    resumed = Life(lab, "train", "--resume", "--run", run.path).end()
    assert resumed.code == 0, resumed.err
    assert_same_end(run, reference)
    return starts(run)[-1]


@pytest.mark.chaos("SIGTERM during an evaluation",
                   must="leaves the evaluation, with everything saved; ends as the uninterrupted run")
def test_during_an_evaluation(lab, reference, told):
    term = partial(faults.around, "dougong.evaluate:bits_per_byte", before=TERM, turn=2)
    step = stop_and_go_on(lab, reference, "evaluating", term)
    evaluated = [event["attempt"] for event in read_events(lab / "evaluating" / "events.jsonl")
                 if event["event"] == "evaluation" and event["step"] == step]
    assert step == 40 and evaluated == [2], "it lingered until the evaluation had ended"
    told(f"left the evaluation of step {step}, and made up for it when resumed")


@pytest.mark.chaos("SIGTERM during a save",
                   must="the save ends, the run stops; ends as the uninterrupted run")
def test_during_a_save(lab, reference, told):
    term = partial(faults.around, "dougong.train.checkpoint:write_tensors", before=TERM, turn=7)
    told(f"stopped at step {stop_and_go_on(lab, reference, 'saving', term)}")


@pytest.mark.chaos("SIGTERM twenty times in a row",
                   must="as one: stops with everything saved; ends as the uninterrupted run")
def test_again_and_again(lab, reference, told):
    many = partial(faults.all_of, *(partial(faults.at_step, step, TERM) for step in [17] * 20))
    told(f"stopped at step {stop_and_go_on(lab, reference, 'insisting', many)}")
