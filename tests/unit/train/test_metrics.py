"""What the events of steps say of the time between them."""

from types import SimpleNamespace

import pytest
import torch

from dougong.core.events import EventLog, read_events
from dougong.train.metrics import RankMeter, Reporter, StepMeter
from dougong.train.step import StepResult


def told(path, steps, meter, **settings):
    """The `step` events of a run in which those of `steps` that are True are skipped, each after half a second of
    computing again."""
    meter = meter(Reporter(EventLog(path)), every=5, total_steps=len(steps), **settings)
    state = SimpleNamespace(window={}, skips=0, tokens=0, elapsed_s=0.0, loader=None)
    for number, skipped in enumerate(steps, 1):
        meter(StepResult(state=state, step=number, metrics={"loss": 3.0}, lr=0.1, grad_norm=1.0, weight=8.0, tokens=8,
                         seconds=0.1, skipped="the loss is nan" if skipped else None,
                         phases={"backward": 0.1, **({"rerun": 0.5} if skipped else {})}))
    return [event for event in read_events(path) if event["event"] == "step"]


def test_the_time_of_skipped_steps_comes_with_the_next_step_that_is_told(tmp_path):
    steps = [False] * 5 + [True] * 5 + [False] * 5
    events = told(tmp_path / "first.jsonl", steps, StepMeter, device=torch.device("cpu"))
    assert [event["step"] for event in events] == [5, 15]
    assert events[0]["phases"] == {"backward": pytest.approx(0.5)}
    assert events[1]["phases"] == {"backward": pytest.approx(1.0), "rerun": pytest.approx(2.5)}
    others = told(tmp_path / "other.jsonl", steps, RankMeter)
    assert sum(event["phases"].get("rerun", 0.0) for event in others) == pytest.approx(2.5)
