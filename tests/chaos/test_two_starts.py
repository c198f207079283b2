"""Two starts of one run at once: one of them trains."""

import pytest
from ends import RunDirectory, assert_same_end
from lives import Life


@pytest.mark.chaos("one run resumed twice at once",
                   must="one is refused, naming the other; the run ends as the uninterrupted one")
def test_resumed_twice_at_once(lab, reference, told):
    run = RunDirectory(lab / "doubled")
    first = Life(lab, "train", lab / "tiny.yaml", "--run", run.path)
    first.wait_until(lambda: run.checkpoint_steps() != [])
    first.send(9)
    first.end()
    both = [Life(lab, "train", "--resume", "--run", run.path) for _ in range(2)]
    ended = sorted((life.end() for life in both), key=lambda one: one.code)
    assert [one.code for one in ended] == [0, 2], ended
    assert "in use by dougong train, process" in ended[1].err, ended[1].err
    assert_same_end(run, reference)
    told("one went on, the other left with exit code 2")


@pytest.mark.chaos("one recipe started twice at once under one name",
                   must="two runs, both equal to the reference")
def test_started_twice_at_once(lab, reference, told):
    path = lab / "twins"
    both = [Life(lab, "train", lab / "tiny.yaml", "--run", path) for _ in range(2)]
    assert [life.end().code for life in both] == [0, 0]
    for run in (RunDirectory(path), RunDirectory(f"{path}-2")):
        assert_same_end(run, reference)
    told("twins and twins-2")
