"""What holds for the distributed core as a whole: how long it waits, and how much there is to read."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

import dougong
from dougong.core.errors import DougongError
from dougong.runtime import processes
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.processes import first_alone, wait_up_to


def _waits_alone(seconds, told):
    """Process 0 waits for a sum that process 1 never joins, and tells how long it did."""
    wait_up_to(seconds, [None])
    if dist.get_rank() == 1:
        time.sleep(5 * seconds)
        return
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
    finally:
        told.write_text(str(time.monotonic() - begin))


def test_once_steps_run_who_waits_alone_gives_up_after_a_steps_time(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 0:(.|\n)*(?i:time)"):
        run_processes(2, _waits_alone, 2, tmp_path / "told")
    assert 1.5 < float((tmp_path / "told").read_text()) < 9 < processes.START_TIMEOUT_S


def _limits():
    """Seconds that each group waits before the first step, and after it."""
    groups = Runtime.start(RuntimeConfig(device="cpu", threads=1), LayoutConfig(replicate=2, shard=2)).mesh.groups

    def limits():
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}

    before = limits()
    wait_up_to(processes.STEP_TIMEOUT_S, groups)
    return before, limits()


def test_every_group_waits_a_start_before_the_first_step_and_a_steps_time_after_it():
    assert run_processes(4, _limits) == [({processes.START_TIMEOUT_S}, {processes.STEP_TIMEOUT_S})] * 4


def _first_alone(fails):
    wait_up_to(1, [None])

    def work():
        time.sleep(2.5)
        if fails:
            raise ValueError("no disk")
        return "scored"

    try:
        return first_alone("score", work)
    except (ValueError, DougongError) as error:
        return str(error)


@pytest.mark.parametrize(("fails", "ends"), [
    (False, ["scored", None, None]), (True, ["no disk", *["process 0 failed; what it says tells why."] * 2])])
def test_the_others_wait_for_what_the_first_does_alone_longer_than_for_a_step(fails, ends):
    assert run_processes(3, _first_alone, fails) == ends


def test_one_process_does_it_at_once():
    assert first_alone("score", lambda: "scored") == "scored"


def test_the_core_stays_small_enough_to_be_read():
    home = Path(dougong.__file__).parent
    files = [*home.glob("runtime/*.py"), *home.glob("parallel/*.py"),
             *(home / "train" / f"{name}.py" for name in ("sharded", "parts", "peers", "manifest", "checkpoint"))]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 3000
