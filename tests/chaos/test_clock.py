"""A wall clock that jumps, as after a suspended laptop or a correction from the network."""

from functools import partial

import faults
import pytest
from ends import RunDirectory, assert_same_end
from lives import Life


@pytest.mark.chaos("the wall clock jumps a day ahead or back in the middle of training",
                   must="ends as the uninterrupted run, with a report")
@pytest.mark.parametrize("hours", [24, -24])
def test_jumping_clock(lab, reference, told, hours):
    run = RunDirectory(lab / f"clock{hours}")
    ended = Life(lab, "train", lab / "tiny.yaml", "--run", run.path,
                 fault=partial(faults.clock_jumps, 30, hours * 3600)).end()
    assert ended.code == 0, ended.err
    assert_same_end(run, reference)
    told(f"by {hours} hours at step 30")
