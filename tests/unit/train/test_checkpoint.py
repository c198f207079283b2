"""Checkpoints on disk: whole or not there, and what they restore."""

import errno
import json
import shutil

import pytest
import safetensors.torch
import torch
from tiny_training import ADAMW, OBJECTIVE, RUNTIME, TinyLM, assert_same, flat, tiny_config, tiny_state

from dougong.core.errors import CheckpointError, DougongError
from dougong.core.events import EventLog
from dougong.core.run import RunDirectory
from dougong.optim import OPTIMIZERS
from dougong.train import checkpoint, safetensors_file
from dougong.train.checkpoint import (
    Checkpointer,
    best_valid,
    latest_valid,
    load_checkpoint,
    load_model_tensors,
    save_checkpoint,
)
from dougong.train.hooks import SaveCheckpoints
from dougong.train.loop import fit
from dougong.train.metrics import Reporter


def trained(done, **options):
    state = tiny_state(**options)
    for _ in zip(range(done), fit(state, OBJECTIVE, RUNTIME, tiny_config())):
        pass
    return state


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(run, kind):
    options = {"optimizer": OPTIMIZERS[kind](), "steps": 9}
    whole, first = trained(9, **options), trained(4, **options)
    save_checkpoint(run, first)
    # other weights, other random numbers: all must come from the disk
    resumed = tiny_state(seed=99, **options)
    load_checkpoint(latest_valid(run).path, resumed)
    results = list(fit(resumed, OBJECTIVE, RUNTIME, tiny_config(9)))
    assert [r.step for r in results] == [5, 6, 7, 8, 9]
    assert_same(flat(whole), flat(resumed))
    a, b = whole.state_dict()["json"], resumed.state_dict()["json"]
    assert {**a, "elapsed_s": 0} == {**b, "elapsed_s": 0}


def test_files_are_plain_safetensors_and_json(run):
    state = trained(3)
    saved = save_checkpoint(run, state, recipe_hash="abc")
    assert {p.name for p in saved.path.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "shadow.safetensors", "rng.safetensors", "state.json",
        "manifest.json"}
    weights = safetensors.torch.load_file(saved.path / "model.safetensors")
    assert set(weights) == {n for n, _ in state.model.named_parameters()}
    assert all(torch.equal(weights[n], p) for n, p in state.model.named_parameters())
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["recipe"] == "abc" and len(manifest["files"]) == 5
    assert saved.bytes == sum(p.stat().st_size for p in saved.path.iterdir() if p.name != "manifest.json")


def test_own_writer_equals_the_packages_reader_for_every_type(tmp_path):
    tensors = {f"{dtype}".removeprefix("torch."): torch.arange(-3, 4).to(dtype).reshape(7, 1)[::2]
               for dtype in safetensors_file._NAMES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    safetensors_file.write_tensors(tmp_path / "x.safetensors", tensors)
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "shadow.safetensors",
                                  "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "tear", "remove"])
def test_a_damaged_file_is_noticed_named_and_passed_over(run, name, damage):
    save_checkpoint(run, trained(2))
    state = trained(4)
    path = save_checkpoint(run, state).path
    content = bytearray((path / name).read_bytes())
    content[-1 if name == "state.json" else len(content) // 2] ^= 1
    if damage == "remove":
        (path / name).unlink()
    else:
        (path / name).write_bytes(content if damage == "flip" else content[:-7])
    found = latest_valid(run)
    assert found.step == 2 and len(found.problems) == 1 and f"step-000004/{name}" in found.problems[0]
    before = flat(state)
    with pytest.raises(CheckpointError, match="cannot be trusted"):
        load_checkpoint(path, state)
    assert_same(before, flat(state))


def test_without_a_manifest_it_does_not_exist(run):
    path = save_checkpoint(run, trained(2)).path
    (path / "manifest.json").write_text('{"format": 1, "fi')
    found = latest_valid(run)
    assert found.path is None and "manifest" in found.problems[0]
    assert latest_valid(RunDirectory(run.path / "nothing")).path is None


@pytest.mark.parametrize("at", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_is_explained_and_loses_nothing(run, monkeypatch, at):
    save_checkpoint(run, trained(2))
    state = trained(4)
    before = flat(state)
    real_tensors, real_json = checkpoint.write_tensors, checkpoint.files.write_json

    def full(real):
        def write(path, *rest):
            if path.name == at:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, *rest)
        return write

    monkeypatch.setattr(checkpoint, "write_tensors", full(real_tensors))
    monkeypatch.setattr(checkpoint.files, "write_json", full(real_json))
    with pytest.raises(DougongError, match="the disk is full"):
        save_checkpoint(run, state)
    assert_same(before, flat(state))
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000002"]
    background = Checkpointer(run)
    background.save(state, "interval")
    with pytest.raises(DougongError, match="the disk is full"):
        background.wait()
    monkeypatch.undo()
    background.save(state, "interval")
    background.wait()
    assert latest_valid(run).step == 4


def test_background_saving_holds_the_moment_it_was_asked_for(run, monkeypatch):
    import threading
    gate, real = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *a: (gate.wait(10), real(*a))[1])
    state = tiny_state()
    steps = fit(state, OBJECTIVE, RUNTIME, tiny_config())
    next(steps), next(steps)
    moment = flat(state)
    background = Checkpointer(run)
    background.save(state, "interval")
    next(steps), next(steps)
    assert background.poll() == [] and latest_valid(run).path is None
    gate.set()
    saved, = background.wait()
    assert saved.step == 2 and background.poll() == []
    other = tiny_state(seed=7)
    load_checkpoint(saved.path, other)
    assert_same(moment, flat(other))


def test_the_last_ones_and_the_best_are_kept(run):
    background = Checkpointer(run, keep_last=2, keep_best=True)
    state = tiny_state()
    for result in fit(state, OBJECTIVE, RUNTIME, tiny_config()):
        if result.step == 3:
            state.best = {"loss": 1.0, "step": 3, "waited": 0}
        if result.step <= 7:
            background.save(state, "interval")
    background.wait()
    assert run.checkpoint_steps() == [3, 6, 7]
    assert best_valid(run).step == 3 and latest_valid(run).step == 7


def test_every_so_many_steps_one_is_saved_and_never_removed(run):
    state, background = tiny_state(), Checkpointer(run, keep_last=1, keep_best=False, keep_every=4)
    hook = SaveCheckpoints(Reporter(EventLog(run.events)), background, every=3, total_steps=20)
    for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(11)):
        hook(result)
    hook.finish(state)
    assert run.checkpoint_steps() == [4, 8, 11]


def test_left_overs_of_a_killed_save_are_cleared_away(run):
    save_checkpoint(run, trained(2))
    (run.checkpoints / ".step-000009").mkdir()
    Checkpointer(run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000002"]


def assert_holds(path, kept):
    resumed = tiny_state(seed=5)
    load_checkpoint(path, resumed)
    assert_same(flat(resumed), kept)


def assert_alone(run, path, kept):
    """What the next start leaves: one checkpoint, by its name, of this state."""
    Checkpointer(run)
    assert [p.name for p in run.checkpoints.iterdir()] == [path.name]
    assert_holds(path, kept)


@pytest.mark.parametrize("new_is_whole", [True, False])
def test_a_kill_while_one_checkpoint_makes_way_for_another_leaves_one_of_them(run, new_is_whole):
    """As going back does, which saves again the step that it loaded. Between its two renames neither has its name."""
    old, new = trained(4), trained(4, seed=9)
    path = save_checkpoint(run, new).path
    hidden, made_way = run.checkpoints / f".{path.name}", run.checkpoints / f".{path.name}-old"
    path.rename(hidden)
    save_checkpoint(RunDirectory(run.path / "other"), old).path.rename(made_way)
    if not new_is_whole:
        (hidden / "manifest.json").write_text("{")
    kept = flat(new if new_is_whole else old)
    found = latest_valid(run)       # what a resume asks before it makes a Checkpointer
    assert found.step == 4 and not found.problems
    assert_holds(found.path, kept)
    assert_alone(run, path, kept)


def test_a_copy_without_a_name_gives_way_to_the_checkpoint_that_has_it(run):
    path, kept = save_checkpoint(run, trained(4)).path, flat(trained(4))
    for name in (f".{path.name}", f".{path.name}-old"):
        shutil.copytree(path, run.checkpoints / name)
    assert latest_valid(run).path == path
    assert_alone(run, path, kept)


def test_another_recipe_model_or_optimiser_is_refused_before_anything_changes(run):
    path = save_checkpoint(run, trained(2), recipe_hash="aaa").path
    with pytest.raises(CheckpointError, match="another recipe"):
        load_checkpoint(path, tiny_state(), recipe_hash="bbb")
    wider = tiny_state(seed=5)
    wider.model = TinyLM(dim=12)
    for state, reason in ((wider, r"\(11, 8\) in the checkpoint, \(11, 12\) here"),
                          (tiny_state(seed=5, optimizer=ADAMW), "optimiser"),
                          (tiny_state(seed=5, ema=False), "average")):
        before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(path, state)
        assert_same(before, {n: p.detach() for n, p in state.model.named_parameters()})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_put_back_shares_no_memory_with_the_one_it_came_from(kind):
    one, other = trained(3, optimizer=OPTIMIZERS[kind]()), tiny_state(seed=5, optimizer=OPTIMIZERS[kind]())
    held = flat(one)
    other.load_state_dict(one.state_dict())
    for group in ("model", "optimizer", "shadow"):
        for tensor in one.state_dict()["tensors"][group].values():
            tensor.zero_()
    found = flat(other)
    assert_same({k: v for k, v in found.items() if not k.startswith("rng")},
                {k: v for k, v in held.items() if not k.startswith("rng")})
    other.load_state_dict(other.state_dict())
    assert_same(flat(other), found)


def test_weights_alone_can_be_read_raw_or_averaged(run):
    state = trained(4)
    path = save_checkpoint(run, state).path
    assert_same(load_model_tensors(path, weights="ema"), state.shadow.tensors)
    plain = save_checkpoint(run, trained(5, ema=False)).path
    with pytest.raises(CheckpointError, match=r"train\.ema"):
        load_model_tensors(plain, weights="ema")


def test_a_damaged_directory_makes_way_for_a_new_save_of_its_step(run):
    state = trained(3)
    path = save_checkpoint(run, state).path
    (path / "state.json").unlink()
    save_checkpoint(run, state)
    assert latest_valid(run).step == 3
