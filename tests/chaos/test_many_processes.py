"""Runs of several processes: one of them is told to stop, is slow or hangs; another number of them goes on."""

import json
import signal
from functools import partial

import faults
import pytest
from ends import RunDirectory, losses, starts
from safetensors.torch import load_file
from teams import Team
from tiny_recipe import MODELS, write_recipe

from dougong.core.events import read_events

STEPS = 40


@pytest.fixture(scope="module")
def still(lab):
    """A recipe without dropout, whose losses several processes reproduce: other layouts draw other random numbers."""
    return write_recipe(lab / "still.yaml", lab / "texts", model=MODELS["nano"], optim={"kind": "adamw", "lr": 3e-4},
                        train={"minutes": None, "steps": STEPS, "rows": 8, "ema": {"decay": 0.9}, "evaluate_every": 20,
                               "checkpoint_every": 5, "trackers": []},
                        sample={"prompts": []}, evaluate={"tokens": 500, "baselines": False})


@pytest.fixture(scope="module")
def alone(lab, still):
    """The recipe trained by one process."""
    return trained(lab, still, "alone", 1)


@pytest.fixture(scope="module")
def pair(lab, still):
    """The recipe trained by two processes that share the weights."""
    return trained(lab, still, "pair", 2, "layout.shard=2")


def trained(lab, recipe, name, number, *overrides):
    ended = Team(lab, number, "train", recipe, "--run", lab / name, *overrides,
                 faults={rank: partial(faults.record_rows, lab / f"{name}.rows") for rank in range(number)}).end()
    assert [one.code for one in ended] == [0] * number, ended
    return RunDirectory(lab / name)


def assert_identical(run, reference):
    """Every tensor of the last checkpoint, in all its parts, and every loss."""
    step = reference.checkpoint_steps()[-1]
    assert run.checkpoint_steps()[-1] == step
    files = {path.name for path in reference.checkpoint(step).glob("*.safetensors")}
    assert files == {path.name for path in run.checkpoint(step).glob("*.safetensors")} and len(files) >= 6
    for file in sorted(files):
        own, theirs = (load_file(one.checkpoint(step) / file) for one in (run, reference))
        assert own.keys() == theirs.keys() and all(own[name].equal(theirs[name]) for name in own), file
        assert all(bool(tensor.isfinite().all()) for tensor in own.values() if tensor.is_floating_point())
    assert losses(run) == losses(reference)


def largest_difference(run, reference):
    """Of the losses of all steps, relative."""
    own, theirs = losses(run), losses(reference)
    assert own.keys() == theirs.keys() and len(own) == STEPS
    return max(abs(own[step] - theirs[step]) / theirs[step] for step in own)


def rows_taken(file):
    """Batch -> place -> the one row that was ever given out there. Fails if a batch was once given out otherwise."""
    found = {}
    for line in file.read_text().splitlines():
        number, place, text = line.split()
        assert found.setdefault((int(number), int(place)), text) == text, f"batch {number} was another one this time"
    return found


def killed(team, rank):
    """Waits until this process has been killed; then so are the others, which wait for it."""
    assert team.lives[rank].end().code == -signal.SIGKILL
    team.kill()


@pytest.mark.slow
@pytest.mark.chaos("stopped and killed by turns, gone on with by 2, 4, 1 and 2 processes",
                   must="the sample stream of the uninterrupted run of one process; losses within 1e-6 of its")
def test_other_numbers_of_processes(lab, still, alone, told):
    run, record = RunDirectory(lab / "passed-on"), lab / "passed-on.rows"
    watched = {rank: partial(faults.record_rows, record) for rank in range(4)}

    def until(step, rank, number):
        fault = partial(faults.at_step, step, partial(faults.stop_with, number))
        return watched | {rank: partial(faults.all_of, watched[rank], fault)}

    begun = Team(lab, 2, "train", still, "--run", run.path, "layout.shard=2", faults=until(12, 0, signal.SIGKILL))
    killed(begun, 0)
    resume = "train", "--resume", "--run", run.path
    killed(Team(lab, 4, *resume, "layout.shard=2", "layout.replicate=2", faults=until(22, 3, signal.SIGKILL)), 3)
    assert [one.code for one in Team(lab, 1, *resume, faults=until(31, 0, signal.SIGTERM)).end()] == [0]
    assert [one.code for one in Team(lab, 2, *resume, "layout.shard=2", faults=watched).end()] == [0, 0]
    _, second, third, last = starts(run)
    assert 0 < second <= 12 < third <= 22 and last == 31
    expected = rows_taken(lab / "alone.rows")
    assert {key: text for key, text in rows_taken(record).items() if key in expected} == expected
    difference = largest_difference(run, alone)
    assert difference < 1e-6
    told(f"legs began at steps {starts(run)}; {len(expected)} rows in the same places; losses differ by at most "
         f"{difference:.1e} relative")


@pytest.mark.slow
@pytest.mark.chaos("SIGTERM to one of two processes",
                   must="both stop after the same step with everything saved; going on ends as the uninterrupted run "
                        "of two")
def test_one_process_is_told_to_stop(lab, still, pair, told):
    run = RunDirectory(lab / "told-to-stop")
    stop = partial(faults.at_step, 17, partial(faults.stop_with, signal.SIGTERM))
    ended = Team(lab, 2, "train", still, "--run", run.path, "layout.shard=2", faults={1: stop}).end()
    assert [one.code for one in ended] == [0, 0], ended
    assert "Stopped at step" in ended[0].out
    assert [one.code for one in Team(lab, 2, "train", "--resume", "--run", run.path).end()] == [0, 0]
    assert_identical(run, pair)
    told(f"both stopped after step {starts(run)[1]}; bit-identical")


@pytest.mark.slow
@pytest.mark.chaos("one of two processes is slow for ten steps",
                   must="ends as the uninterrupted run of two; its events show where the time went")
def test_one_process_is_slow(lab, still, pair, told):
    run = RunDirectory(lab / "slow")
    ended = Team(lab, 2, "train", still, "--run", run.path, "layout.shard=2",
                 faults={1: partial(faults.slow, 0.1, range(20, 30))}).end()
    assert [one.code for one in ended] == [0, 0], ended
    assert_identical(run, pair)
    waited = {event["step"]: event["phases"]["wait"] for event in read_events(run.events) if event["event"] == "step"}
    assert sum(waited[step] for step in range(21, 31)) > 0.5
    told(f"process 0 waited {sum(waited[step] for step in range(21, 31)):.2f} s for it in those steps; bit-identical")


@pytest.mark.slow
@pytest.mark.chaos("one of two processes hangs",
                   must="it is named with its stack, all leave; going on ends as the uninterrupted run of two")
def test_one_process_hangs(lab, still, pair, told):
    run = RunDirectory(lab / "hung")
    watch = partial(faults.impatient_watch, 3.0)
    ended = Team(lab, 2, "train", still, "--run", run.path, "layout.shard=2",
                 faults={0: watch, 1: partial(faults.all_of, watch, partial(faults.hang_at, 13))}).end(60)
    assert [one.code for one in ended] == [70, 70], ended
    named = next(event for event in read_events(run.events) if event["event"] == "hang")
    assert [one["rank"] for one in named["processes"]] == [1], json.dumps(named)
    assert "time.sleep(3600)" in named["processes"][0]["stack"] and "process 1 of 2 hangs" in ended[0].err
    assert [one.code for one in Team(lab, 2, "train", "--resume", "--run", run.path).end()] == [0, 0]
    assert_identical(run, pair)
    told(f"named after {named['waited_s']:.0f} s of waiting (limit set to 3), going on from step {starts(run)[-1]}")
