"""NaN in the data: one bad batch is left out, many stop the run before the weights suffer."""

from functools import partial

import faults
import pytest
from ends import RunDirectory, losses
from lives import Life
from safetensors.torch import load_file

from dougong.core.events import read_events


def skips(run):
    return [event["step"] for event in read_events(run.events) if event["event"] == "skip"]


@pytest.mark.chaos("one batch with a NaN in it",
                   must="its step is skipped and told; no weight moves by it; the run ends near the undisturbed loss")
def test_one_bad_batch(lab, reference, told):
    run = RunDirectory(lab / "one-nan")
    ended = Life(lab, "train", lab / "tiny.yaml", "--run", run.path,
                 fault=partial(faults.batches_with_nan, range(22, 23))).end()
    assert ended.code == 0, ended.err
    assert skips(run) == [22]
    own, theirs = losses(run), losses(reference)
    assert {step: own[step] for step in range(1, 22)} == {step: theirs[step] for step in range(1, 22)}
    assert 22 not in own and own[60] == pytest.approx(theirs[60], rel=0.02)
    told(f"step 22 skipped; loss {own[60]:.4f} at the end, undisturbed {theirs[60]:.4f}")


@pytest.mark.chaos("every batch from step 22 on with a NaN in it",
                   must="training stops with a clear error; the batch and the last good weights are on disk; "
                        "with the data repaired the run goes on")
def test_bad_batches_without_end(lab, reference, told):
    run = RunDirectory(lab / "all-nan")
    ended = Life(lab, "train", lab / "tiny.yaml", "--run", run.path,
                 fault=partial(faults.batches_with_nan, range(22, 1000))).end()
    assert ended.code == 2 and "steps in a row were skipped" in ended.err and "Traceback" not in ended.err, ended
    batch, = run.path.glob("offending-batch-*.safetensors")
    assert bool(load_file(batch)["weight"].isnan().any())
    for step in run.checkpoint_steps():
        weights = load_file(run.checkpoint(step) / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    repaired = Life(lab, "train", "--resume", "--run", run.path).end()
    assert repaired.code == 0, repaired.err
    own = losses(run)
    assert own[60] < own[21]
    told(f"stopped after skipping steps {skips(run)[0]} to {skips(run)[-1]}, exit code 2; {batch.name} holds the "
         f"batch; with good data it went on to loss {own[60]:.4f}")
