"""A process that hangs is named, with the line it hangs in, and all processes end; a slow one is waited for."""

import json
import os
import threading
import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_processes
from tiny_training import OBJECTIVE, RUNTIME, tiny_config, tiny_state

from dougong.core.events import EventLog
from dougong.core.files import write_text
from dougong.core.run import RunDirectory
from dougong.train import checkpoint
from dougong.train import step as step_module
from dougong.train.checkpoint import Checkpointer
from dougong.train.config import SpikeConfig
from dougong.train.hooks import Hooks, SaveCheckpoints
from dougong.train.loop import fit
from dougong.train.metrics import Reporter
from dougong.train.phases import Clock
from dougong.train.reading import Reading
from dougong.train.rewind import go_back
from dougong.train.spikes import Rewind
from dougong.train.watch import EXIT_HUNG, StoreBoard, Watch, _waits

STEPS = 6


class FolderBoard:
    """Files in a directory that all processes share."""

    def __init__(self, directory):
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, name, text):
        write_text(self._directory / name, text)

    def read(self, name):
        return (self._directory / name).read_text() if (self._directory / name).exists() else None


class Memory(dict):
    """A board within one process."""

    write, read = dict.__setitem__, dict.get


def in_lockstep(folder, use_store, hangs_at, seconds, told):
    """A loop like `fit`'s, in which process 1 sleeps in one phase of its fourth step while process 0 waits for it."""
    rank, clock = dist.get_rank(), Clock()
    board = StoreBoard() if use_store else FolderBoard(folder / "board")

    def on_hang(fields):
        (folder / f"hang-{rank}.json").write_text(json.dumps(fields))

    with Watch(clock, board, rank=rank, size=2, directory=folder, floor_s=told, start_s=20.0, interval_s=0.1,
               on_hang=on_hang):
        for step in range(STEPS):
            clock.begin_step(step)
            for phase in ("data", "backward"):
                with clock(phase):
                    if rank == 1 and step == 3 and phase == hangs_at:
                        time.sleep(seconds)     # the line that is to be shown
            with clock("norm"):
                dist.all_reduce(torch.ones(1))
            clock.end_step(0.01)
    return clock.step


@pytest.mark.parametrize(("use_store", "phase"), [(True, "data"), (False, "backward")])
def test_a_hung_process_is_named_with_its_phase_and_line(tmp_path, capfd, use_store, phase):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=f"{EXIT_HUNG}"):
        run_processes(2, in_lockstep, tmp_path, use_store, phase, 60, 0.8)
    assert time.monotonic() - begin < 20, "it waited for the sleeper instead of ending it"
    message = capfd.readouterr().err
    assert f"process 1 of 2 hangs: step 4, phase {phase}" in message
    assert "time.sleep(seconds)     # the line that is to be shown" in message
    assert "in the main thread:" in message and "process 0 of 2 hangs" not in message and message.count("hangs:") == 1
    for rank in range(2):
        told = json.loads((tmp_path / f"hang-{rank}.json").read_text())
        assert [one["rank"] for one in told["processes"]] == [1] and told["processes"][0]["phase"] == phase
    for rank, inside in ((0, "all_reduce"), (1, "in_lockstep")):
        stacks = (tmp_path / f"stacks-rank-{rank:05d}.txt").read_text()
        assert inside in stacks and "Thread 0x" in stacks


def test_a_process_within_its_limit_is_waited_for(tmp_path):
    assert run_processes(2, in_lockstep, tmp_path, True, "data", 0.6, 3.0) == [STEPS, STEPS]
    assert not list(tmp_path.glob("stacks-*")) and not list(tmp_path.glob("hang-*"))


def test_a_process_that_alone_does_something_long_for_the_first_time_is_no_hang(tmp_path):
    def work(folder):
        rank, clock = dist.get_rank(), Clock()
        with Watch(clock, StoreBoard(), rank=rank, size=2, directory=folder, floor_s=0.3, start_s=20.0,
                   interval_s=0.05):
            for step in range(3):
                clock.begin_step(step)
                with clock("norm"):
                    dist.all_reduce(torch.ones(1))
                clock.end_step(0.01)
                if rank == 0 and step == 1:
                    with clock("sample"):
                        time.sleep(1.5)
        return clock.step

    assert run_processes(2, work, tmp_path) == [3, 3]


def test_limits_are_generous_until_a_phase_is_known_and_then_follow_it():
    clock = Clock()
    watch = Watch(clock, FolderBoard.__new__(FolderBoard), rank=0, size=1, directory=None, start_s=1800)
    clock.begin_step(0)
    assert watch.limit_s() == 1800
    for seconds in (40, 20.0, 20.0):
        clock.end_step(seconds)
        clock.begin_step(1)
    assert watch.limit_s() == 200
    with clock("evaluation"):
        assert watch.limit_s() == 1800
    with clock("evaluation"):
        assert watch.limit_s() == 60


def test_looking_through_the_rows_of_a_bad_step_may_take_as_long_as_a_start_however_short_computing_it_again_was():
    clock = Clock()
    watch = Watch(clock, Memory(), rank=0, size=1, directory=None, start_s=1800)
    clock.begin_step(0)
    clock.end_step(1.0)
    with clock("rerun"), clock("backward"):
        assert watch.limit_s() == 60, "the computation itself is one of many"
    with clock("rerun"):
        assert watch.limit_s() == 1800


def moments_of_a_step(monkeypatch):
    """What is on the board at some moments of a step that is computed twice, in their order."""
    clock, state, board = Clock(), tiny_state(), Memory()
    watch = Watch(clock, board, rank=0, size=1, directory=None)
    losses, read, moments = type(OBJECTIVE).losses, Reading.read, {}

    def note(name):
        watch._write(clock.phase)
        moments.setdefault(name, json.loads(board["rank-0"]))

    def noting_losses(self, model, batch):
        note("again" if "read" in moments else "forward")
        note("second forward")      # of the same gradient
        return losses(self, model, batch)

    def noting_read(self):
        note("read again" if "again" in moments else "read")
        return read(self)

    with monkeypatch.context() as patched:
        patched.setattr(type(OBJECTIVE), "losses", noting_losses)
        patched.setattr(Reading, "read", noting_read)
        patched.setattr(step_module, "why_not", lambda found, spikes: "it leapt" if "again" not in moments else None)
        patched.setattr(step_module, "_after_step", lambda *_, applied: note("after" if applied else "before again"))
        steps = fit(state, OBJECTIVE, RUNTIME, tiny_config(6, micro_rows=3), clock=clock)
        note("between")
        next(steps)
        with clock("evaluation"):
            note("next")
        steps.close()
    return moments


def test_on_a_gpu_whoever_waits_for_the_device_is_ahead_of_the_one_that_hangs(monkeypatch):
    moments = moments_of_a_step(monkeypatch)
    assert moments["read"]["phase"] == moments["read again"]["phase"] == "read"
    watch = Watch(Clock(), Memory(), rank=0, size=4, directory=None)
    order = ["between", "forward", "read", "before again", "again", "read again", "after", "next"]
    for earlier, later in pairwise(order):
        entries = {rank: {**moments[later if rank != 2 else earlier], "still_s": 99.0, "limit_s": 60.0, "silent_s": 0.0}
                   for rank in range(4)}
        assert watch._stuck(entries) == [2], f"{later} is not after {earlier}"
    assert moments["forward"]["moves"] == moments["second forward"]["moves"]


def test_who_came_first_to_where_another_just_arrived_is_not_named():
    watch = Watch(Clock(), Memory(), rank=0, size=2, directory=None, floor_s=60.0)
    entries = {rank: {"step": 3, "moves": 5, "phase": "backward", "still_s": 61.0, "limit_s": 60.0, "silent_s": 0.0}
               for rank in range(2)}
    assert watch._stuck(entries) == [0, 1]
    entries[1]["still_s"] = 0.2
    assert watch._stuck(entries) == []
    entries[1]["silent_s"] = 60.0
    assert watch._stuck(entries) == [0, 1], "it says nothing any more"


def test_waiting_for_the_device_is_no_time_of_its_own():
    clock = Clock()
    clock.begin_step(0)
    with clock("rerun"):
        with clock.at("read"):
            assert clock.phase == "read"
            time.sleep(0.02)
        assert clock.phase == "rerun"
    phases = clock.end_step(0.02)
    assert set(phases) == {"rerun"} and phases["rerun"] >= 0.02


def test_of_those_that_can_still_print_one_does(tmp_path, monkeypatch, capsys):
    """Process 0 is frozen though not at fault; 1 and 3 find that 2 hangs, or it finds so itself."""
    entries = {rank: {"step": 3, "moves": 3 if rank == 2 else 9, "phase": "backward", "still_s": 61.0, "limit_s": 60.0,
                      "silent_s": 0.0} for rank in range(4)}
    monkeypatch.setattr(os, "_exit", lambda code: None)
    for leaving in ((1, 3), (3, 1), (2,), (1, 2)):
        board = Memory({"stack-2": 'File "loss.py", line 7, in losses'})
        for rank in leaving:
            Watch(Clock(), board, rank=rank, size=4, directory=tmp_path, interval_s=0.01)._leave(entries, [2], 61.0)
        assert capsys.readouterr().err.count("process 2 of 4 hangs") == 1


def saving(folder, clock, *, every, total_steps):
    """The hook that saves, in a directory of its own, and what it saves with."""
    run = RunDirectory(folder)
    checkpointer = Checkpointer(run)
    return checkpointer, SaveCheckpoints(Reporter(EventLog(run.events)), checkpointer, every=every,
                                         total_steps=total_steps)


def test_a_disk_may_be_slow_at_every_save_and_on_the_way_back(tmp_path, monkeypatch):
    """However fast the steps and the copies before were."""
    clock, state, limits = Clock(), tiny_state(steps=6), {}
    watch = Watch(clock, FolderBoard(tmp_path), rank=0, size=1, directory=tmp_path, start_s=1800)
    checkpointer, save = saving(tmp_path, clock, every=2, total_steps=6)

    def wait(moment, real=checkpointer.wait):
        def waited(**given):
            limits[moment] = watch.limit_s()
            return real(**given)

        return waited

    hooks = Hooks(state, [save], clock)
    for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(6), clock=clock):
        monkeypatch.setattr(checkpointer, "wait", wait(f"save at step {result.step}"))
        hooks.run(result)
    state.spikes.config, state.rewind = SpikeConfig(), Rewind(step=5, first=4, last=5, leaps=1)
    monkeypatch.setattr(checkpointer, "wait", wait("way back"))
    assert go_back(state, checkpointer)["to_step"] == 4
    monkeypatch.setattr(checkpointer, "wait", wait("finish"))
    hooks.finish(state)
    assert limits.keys() >= {"save at step 4", "save at step 6", "way back", "finish"}
    assert set(limits.values()) == {1800}, limits


def test_a_process_that_waits_for_its_slow_disk_is_no_hang(tmp_path):
    def work(folder):
        rank, clock, state = dist.get_rank(), Clock(), tiny_state()
        if rank == 1:
            publish = checkpoint.publish
            checkpoint.publish = lambda *given, **named: (time.sleep(1.3), publish(*given, **named))
        _, save = saving(folder / f"{rank}", clock, every=2, total_steps=4)
        with Watch(clock, StoreBoard(), rank=rank, size=2, directory=folder, floor_s=0.8, start_s=20.0,
                   interval_s=0.05):
            hooks = Hooks(state, [save], clock)
            for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(4), clock=clock):
                hooks.run(result)
                with clock("wait"):
                    dist.all_reduce(torch.ones(1))
            hooks.finish(state)
        return RunDirectory(folder / f"{rank}").checkpoint_steps()

    assert run_processes(2, work, tmp_path) == [[2, 4], [2, 4]]


def test_of_two_at_the_same_place_the_one_that_waits_is_not_guilty():
    waiting = 'File "loop.py", line 3, in fit\n  File "/x/torch/distributed/distributed_c10d.py", line 9, in all_reduce'
    stuck = 'File "/x/torch/distributed/launcher.py", line 3, in run\n  File "loss.py", line 7, in losses\n    sleep()'
    assert _waits(waiting) and not _waits(stuck) and not _waits(None)
    for_device = 'in the main thread:\n  File "reading.py", line 3, in read\n    self._arrived.synchronize()\n' \
        '  File "/x/torch/cuda/streams.py", line 231, in synchronize\n    super().synchronize()\n'
    for_numbers = '  File "/x/expert.py", line 74, in back\n    sent, come = torch.stack([sent, come]).tolist()\n'
    computing = '  File "/x/torch/cuda_less.py", line 3, in f\n    g(x.tolist)\n'
    assert _waits(for_device) and _waits(for_numbers) and not _waits(computing) and not _waits(for_numbers + stuck)


def test_who_waits_in_an_operation_that_is_called_by_name_is_not_guilty(tmp_path):
    def work(folder):
        import torch.distributed._functional_collectives as collectives

        if dist.get_rank() == 1:
            time.sleep(1.0)
            return collectives.all_reduce(torch.ones(1), "sum", dist.group.WORLD).wait() and ""
        watch, found = Watch(Clock(), Memory(), rank=0, size=1, directory=folder), []
        timer = threading.Timer(0.5, lambda: found.append(watch._stacks()))
        timer.start()
        float(collectives.all_reduce(torch.ones(1), "sum", dist.group.WORLD))
        timer.join()
        return found[0]

    stack = run_processes(2, work, tmp_path)[0]
    assert _waits(stack), stack


def test_a_thread_that_the_main_thread_waits_for_is_shown_too(tmp_path):
    clock, stop = Clock(), threading.Event()

    def fetch_from_a_dead_disk():
        stop.wait()

    worker = threading.Thread(target=fetch_from_a_dead_disk, name="loader_0")
    worker.start()
    try:
        shown = Watch(clock, FolderBoard(tmp_path), rank=0, size=1, directory=tmp_path)._stacks()
    finally:
        stop.set()
        worker.join()
    assert "in thread loader_0:" in shown and "in fetch_from_a_dead_disk" in shown
    assert shown.index("loader_0") < shown.index("in the main thread:")
