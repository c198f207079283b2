"""`kill -9`: at any moment, and before every single change to the disk."""

import random
import shutil
from functools import partial

import faults
import pytest
from ends import RunDirectory, assert_same_end, starts
from lives import Life


def begin_or_go_on(lab, run, fault=None):
    """What a person would do: resume if there is a run, else begin."""
    if run.recipe.exists():
        return Life(lab, "train", "--resume", "--run", run.path, fault=fault)
    shutil.rmtree(run.path, ignore_errors=True)     # killed before the run had a recipe: there was no run yet
    return Life(lab, "train", lab / "tiny.yaml", "--run", run.path, fault=fault)


@pytest.mark.chaos("kill -9 at random moments, resumed every time",
                   must="every run ends with the weights, optimiser state, averages and events of the uninterrupted "
                        "run")
@pytest.mark.timeout(600)
def test_killed_at_random_moments(lab, reference, reference_s, told, request):
    kills, runs, torn, rng = 0, [RunDirectory(lab / "killed-1")], 0, random.Random(0)
    length_s = reference_s      # of a life to which nothing is done: shorter when the machine has less else to do
    while kills < request.config.getoption("--kills"):
        begins, life = not runs[-1].recipe.exists(), begin_or_go_on(lab, runs[-1])
        killed = life.kill_after(rng.uniform(0, length_s))
        kills += killed
        torn += killed and any(runs[-1].checkpoints.glob(".step-*"))
        if not killed:
            length_s = min(length_s, life.end().seconds) if begins else length_s
            assert_same_end(runs[-1], reference)
            runs.append(RunDirectory(lab / f"killed-{len(runs) + 1}"))
    last = begin_or_go_on(lab, runs[-1]).end()
    assert last.code == 0, last.err
    assert_same_end(runs[-1], reference)
    resumed = [step for run in runs for step in starts(run)[1:]]
    told(f"{kills} of {kills} resumed, in {len(runs)} runs; they went on from steps {min(resumed)} to {max(resumed)}; "
         f"{torn} kills tore a save")


@pytest.mark.chaos("kill -9 just before a change to the run's files, at places spread over all changes of a run",
                   must="the next start goes on, and ends as the uninterrupted run")
@pytest.mark.timeout(600)
def test_killed_before_a_disk_operation(lab, reference, told, request):
    count = partial(faults.count_disk_operations, lab / "counted", lab / "operations")
    assert Life(lab, "train", lab / "tiny.yaml", "--run", lab / "counted", fault=count).end().code == 0
    operations = (lab / "operations").stat().st_size
    assert operations > 100
    for number in (tried := places(operations, all_of_them=request.config.getoption("--kills") >= 100)):
        run = RunDirectory(lab / f"operation-{number}")
        killed = begin_or_go_on(lab, run, partial(faults.kill_at_disk_operation, number, run.path))
        assert killed.end().code == -9, f"it lived through operation {number}"
        ended = begin_or_go_on(lab, run).end()
        assert ended.code == 0, f"killed before operation {number}:\n{ended.err}"
        assert_same_end(run, reference)
    told(f"{len(tried)} places among {operations} changes, all went on")


def places(operations, *, all_of_them):
    """The first ones, by which a run comes into being, and others spread over the rest."""
    first, others = (12, 24) if all_of_them else (2, 4)
    rest = operations - first
    return [*range(1, first + 1), *(first + rest * number // others for number in range(1, others + 1))]
