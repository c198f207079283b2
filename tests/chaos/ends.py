"""How a run must end: as the run that nothing was done to, in every tensor, value and event but the clock's."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dougong.core.events import last_per_step, read_events
from dougong.core.run import RunDirectory

_TIMED = {"time", "attempt", "elapsed_s", "tokens_per_s", "seconds", "mfu", "memory_bytes", "phases"}


def assert_same_end(run: RunDirectory, reference: RunDirectory) -> None:
    """The last checkpoints are equal bit for bit, and so is everything the events say of steps and scores."""
    step = reference.checkpoint_steps()[-1]
    assert run.checkpoint_steps()[-1] == step, f"it ended at {run.checkpoint_steps()}, not at step {step}"
    last, goal = run.checkpoint(step), reference.checkpoint(step)
    names = {path.name for path in goal.glob("*.safetensors")}
    assert names == {path.name for path in last.glob("*.safetensors")} and "model.safetensors" in names
    for name in sorted(names):
        _assert_same_tensors(load_file(last / name), load_file(goal / name), name)
    assert _values(last) == _values(goal), "state.json differs"
    differing = [(a, b) for a, b in zip(story(run), story(reference)) if a != b]
    assert not differing, f"the events differ, first {differing[0][0]} instead of {differing[0][1]}"
    assert len(story(run)) == len(story(reference)), "the events are not as many"
    assert _result(run) == _result(reference), "the final scores differ"
    for own, theirs in ((_told(run), _told(reference)), (_files(run), _files(reference))):
        assert own == theirs, f"it lacks {theirs - own}, and {own - theirs} is too much"


def _assert_same_tensors(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], file: str) -> None:
    assert own.keys() == theirs.keys() and own, file
    for name, tensor in own.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), f"{file}: {name} differs"
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{file}: {name} is not finite"


def _values(checkpoint: Path) -> dict[str, Any]:
    values = json.loads((checkpoint / "state.json").read_text())
    values.pop("elapsed_s")
    values["window"].pop("seconds", None)
    return values


def story(run: RunDirectory) -> list[dict[str, Any]]:
    """Steps, skips, evaluations and samples, of each the last, without what depends on the clock."""
    told = [event for event in last_per_step(read_events(run.events))
            if event["event"] in ("step", "evaluation", "sample")]
    return sorted(({key: value for key, value in event.items() if key not in _TIMED} for event in told),
                  key=lambda event: (event["step"], event["event"]))


def losses(run: RunDirectory) -> dict[int, float]:
    """Loss by step; what was repeated counts once. Fails on a loss that is not a finite number."""
    found = {event["step"]: event["loss"] for event in story(run) if event["event"] == "step"}
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in found.values()), found
    return found


def starts(run: RunDirectory) -> list[int]:
    """The step at which each attempt began."""
    return [event["step"] for event in read_events(run.events) if event["event"] == "start"]


def processes(run: RunDirectory) -> list[int]:
    """How many processes each attempt had."""
    return [event["processes"] for event in read_events(run.events) if event["event"] == "start"]


def steps_done(run: RunDirectory) -> int:
    return max(losses(run), default=0)


def warnings(run: RunDirectory) -> list[str]:
    return [event["message"] for event in read_events(run.events) if event["event"] == "warning"]


def _result(run: RunDirectory) -> Any:
    results = [event for event in read_events(run.events) if event["event"] == "result"]
    assert results, "it was never scored"
    return {key: value for key, value in results[-1].items() if key not in _TIMED}


def _told(run: RunDirectory) -> set[str]:
    """Kinds of events. What was derived is told before the first step; a run killed even before that lacks it."""
    return {event["event"] for event in read_events(run.events)} - {"warning", "derived"}


def _files(run: RunDirectory) -> set[str]:
    return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if not path.name.startswith(".")}
