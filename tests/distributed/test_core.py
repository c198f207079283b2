"""What holds for the distributed core as a whole: how long it waits, and how much there is to read."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

import dougong
from dougong.runtime import processes
from dougong.runtime.processes import expect_steps


def _waits_alone(seconds, told):
    """Process 0 waits for a sum that process 1 never joins, and tells how long it did."""
    processes.STEP_TIMEOUT_S = seconds
    expect_steps([dist.new_group([0, 1])])
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


def test_the_core_stays_small_enough_to_be_read():
    home = Path(dougong.__file__).parent
    files = [*home.glob("runtime/*.py"), *home.glob("parallel/*.py"),
             *(home / "train" / f"{name}.py" for name in ("sharded", "parts", "peers", "manifest", "checkpoint"))]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 3000
