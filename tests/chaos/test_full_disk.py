"""A disk that is full, or becomes read-only: the run ends with a readable error, and goes on when there is room."""

import subprocess
from functools import partial

import faults
import pytest
from disks import mounted
from ends import RunDirectory, assert_same_end, starts
from lives import Life

FULL_AT = 28        # checkpoints are due at 25 and 30


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small", megabytes=8) as folder:
        yield folder


def train_until_full(lab, disk, leaving):
    run = RunDirectory(disk / "run")
    fill = partial(faults.at_step, FULL_AT, partial(faults.fill_disk, disk, leaving))
    ended = Life(lab, "train", lab / "tiny.yaml", "--run", run.path, fault=fill).end()
    assert ended.code == 2 and "the disk is full" in ended.err, ended
    assert "Traceback" not in ended.err, ended.err
    return run


def go_on_with_room(lab, disk, run, reference):
    full = Life(lab, "train", "--resume", "--run", run.path).end()
    assert full.code == 2 and "the disk is full" in full.err and "Traceback" not in full.err, full
    (disk / "ballast").unlink()
    ended = Life(lab, "train", "--resume", "--run", run.path).end()
    assert ended.code == 0, ended.err
    assert 20 <= starts(run)[-1] < FULL_AT + 5, starts(run)
    assert_same_end(run, reference)
    return starts(run)[-1]


@pytest.mark.chaos("the disk becomes full during a save",
                   must="a clear error, older checkpoints whole; with room again, the run ends as the uninterrupted "
                        "one")
def test_full_during_a_save(lab, reference, small_disk, told):
    run = train_until_full(lab, small_disk, leaving=32 * 1024)      # events fit, a checkpoint does not
    assert not any(run.checkpoints.glob(".step-*")), "the unfinished save was left on the full disk"
    told(f"exit code 2 at the save, again when resumed on the full disk; then went on from step "
         f"{go_on_with_room(lab, small_disk, run, reference)}")


@pytest.mark.chaos("the disk becomes full while an event is written",
                   must="a clear error; with room again, the run ends as the uninterrupted one")
def test_full_during_an_event(lab, reference, small_disk, told):
    run = train_until_full(lab, small_disk, leaving=0)
    told(f"exit code 2, then went on from step {go_on_with_room(lab, small_disk, run, reference)}")


@pytest.mark.chaos("the checkpoints' folder becomes read-only",
                   must="a clear error; writable again, the run ends as the uninterrupted one")
def test_checkpoints_become_read_only(lab, reference, told):
    run = RunDirectory(lab / "read-only")
    with mounted(lab / "probe", megabytes=1):
        pass        # skips where mounting is not permitted
    cover = partial(subprocess.run, ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run.checkpoints)], check=True)
    fault = partial(faults.at_step, FULL_AT, cover)
    ended = Life(lab, "train", lab / "tiny.yaml", "--run", run.path, fault=fault).end()
    subprocess.run(["umount", "-l", str(run.checkpoints)], check=True)
    assert ended.code == 2 and "read-only" in ended.err and "Traceback" not in ended.err, ended
    resumed = Life(lab, "train", "--resume", "--run", run.path).end()
    assert resumed.code == 0, resumed.err
    assert_same_end(run, reference)
    told(f"exit code 2 at the save, then went on from step {starts(run)[-1]}")


@pytest.mark.chaos("started in a read-only folder",
                   must="a clear error before any work")
def test_started_in_a_read_only_folder(lab, reference, tmp_path, told):
    with mounted(tmp_path / "sealed", megabytes=1, options=",ro") as folder:
        ended = Life(lab, "train", lab / "tiny.yaml", "--run", folder / "run").end()
    assert ended.code == 2 and "read-only" in ended.err and "Traceback" not in ended.err, ended
    told("exit code 2, naming the folder")
