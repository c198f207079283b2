"""Checkpoints of several processes: whole or not there, each value once, and loaded by any layout bit for bit."""

import errno
import json
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from divided_state import ONE, assert_same, divided_state, together, whole
from processes import run_processes
from torch.distributed.tensor import DTensor

from dougong.core import files
from dougong.core.errors import CheckpointError, DougongError
from dougong.core.run import RunDirectory
from dougong.runtime.layout import LayoutConfig
from dougong.train import parts, sharded
from dougong.train.checkpoint import (
    Checkpointer,
    latest_valid,
    load_checkpoint,
    load_model_tensors,
    save_checkpoint,
)
from dougong.train.config import SpikeConfig
from dougong.train.rewind import go_back
from dougong.train.sharded import share_out
from dougong.train.spikes import Rewind

TWO, FOUR = LayoutConfig(shard=2), LayoutConfig(shard=4)
GRID, COPIES = LayoutConfig(shard=2, tensor=2), LayoutConfig(replicate=2, shard=2)
STAGES, ALL = LayoutConfig(pipeline=2), LayoutConfig(pipeline=2, shard=2, tensor=2)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def saved(run, layout, step=7, **options):
    """Saves a state of `layout` in this process; what it held, whole."""
    state, mesh = divided_state(layout)
    state.step = step
    save_checkpoint(run, state, mesh=mesh, **options)
    return whole(state)


def save(run, layout, **options):
    """The whole state that was saved by as many processes as the layout has."""
    return together(run_processes(layout.processes, saved, run, layout, *options.values()))


def _hop(run, before, layout, after):
    """Loads a checkpoint into another seed's state, and saves it again."""
    state, mesh = divided_state(layout, seed=99, done=False)
    load_checkpoint(run.checkpoint(before), state, mesh=mesh)
    counters = (state.step, state.tokens, state.best, state.loader.position, state.shadow.updates,
                [group["lr"] for group in state.optimizer.param_groups])
    state.step = after
    save_checkpoint(run, state, mesh=mesh)
    return whole(state), counters


def test_any_layout_loads_any_checkpoint_bit_for_bit(run):
    original = save(run, ONE)
    before = 7
    for after, layout in enumerate([TWO, GRID, COPIES, ALL, FOUR, STAGES, LayoutConfig(replicate=2), ONE], 8):
        results = run_processes(layout.processes, _hop, run, before, layout, after)
        assert_same(original, together(held for held, _ in results))
        for _, counters in results:
            assert counters == (before, 700, {"loss": 2.5, "step": 7, "waited": 0}, 21, 1, [0.05, 0.05]), layout
        before = after
    # the last one was written by one process: plain files again, the same as in the beginning
    for name in ("model", "optimizer", "shadow"):
        first, last = (safetensors.torch.load_file(run.checkpoint(step) / f"{name}.safetensors") for step in (7, 15))
        assert_same(first, last)


@pytest.mark.parametrize("layout", [GRID, COPIES, ALL, LayoutConfig(replicate=3)], ids=str)
def test_each_value_is_written_once_and_the_work_is_shared(run, layout):
    original = save(run, layout)
    path = run.checkpoint(7)
    sizes, counted = {}, dict.fromkeys(original, 0)
    for file in path.glob("*.safetensors"):
        group, rank = file.name.split("-")[:2]
        tensors = safetensors.torch.load_file(file)
        sizes[rank] = sizes.get(rank, 0) + sum(t.nbytes for t in tensors.values())
        for name, part in tensors.items() if group != "rng" else ():
            counted[f"{group}/{name}"] += part.numel()
    assert counted == {name: tensor.numel() for name, tensor in original.items()}
    assert len(sizes) == layout.on(layout.processes).processes
    assert max(sizes.values()) - min(sizes.values()) < 800      # the largest tensor that lies whole on one process
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["processes"] == layout.processes and manifest["layout"] == str(layout)
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_pytorchs_own_reader_understands_the_parts(run, tmp_path):
    original = save(run, GRID)
    for file in run.checkpoint(7).glob("model-*"):
        (tmp_path / file.name).symlink_to(file)
    found = {name.removeprefix("model/"): torch.empty_like(t) for name, t in original.items() if "model/" in name}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same({f"model/{name}": t for name, t in found.items()},
                {name: t for name, t in original.items() if "model/" in name})


def test_one_process_reads_weights_whole(run):
    original = save(run, ALL)
    for weights, group in (("raw", "model"), ("ema", "shadow")):
        found = load_model_tensors(run.checkpoint(7), weights=weights)
        assert_same({f"{group}/{name}": t for name, t in found.items()},
                    {name: t for name, t in original.items() if name.startswith(f"{group}/")})


def _reads(run, layout):
    count, real = 0, parts.Stored._slice

    def counting(self, *arguments):
        nonlocal count
        found = real(self, *arguments)
        count += found.numel() if self.group != "rng" else 0
        return found

    parts.Stored._slice = counting
    state, mesh = divided_state(layout, seed=99, done=False)
    load_checkpoint(run.checkpoint(7), state, mesh=mesh)
    groups = state.state_dict()["tensors"]
    return count, sum(parts.local(t).numel() for group in ("model", "optimizer", "shadow")
                      for t in groups[group].values())


def test_each_process_reads_no_more_than_it_holds(run):
    save(run, GRID)
    for read, held in run_processes(4, _reads, run, FOUR):
        assert read == held


def _memory(run, layout):
    """What was read, where it was when the optimiser got it, and how much of the state before was then still there."""
    state, mesh = divided_state(layout, seed=99)
    before = [weakref.ref(parts.local(t)) for slots in state.optimizer.state.values() for t in slots.values()]
    read, alive, real_read, real_load = {}, [], parts.Stored.read, state.optimizer.load_state_dict

    def reading(self, name, wanted=None):
        read[self.group, name] = real_read(self, name, wanted)
        return read[self.group, name]

    parts.Stored.read = reading
    state.optimizer.load_state_dict = lambda new: (alive.append(sum(ref() is not None for ref in before)),
                                                   real_load(new))
    load_checkpoint(run.checkpoint(7), state, mesh=mesh)
    held = {name: parts.local(t) for name, t in state.state_dict()["tensors"]["optimizer"].items()}
    copied = [name for name, t in held.items() if not name.endswith("/step") and t.numel()
              and t.data_ptr() != read["optimizer", name].data_ptr()]
    return alive, copied, len(held)


def test_loading_holds_an_optimisers_state_once(run):
    """A device that training fills has no room for two."""
    save(run, GRID)
    for alive, copied, held in run_processes(4, _memory, run, FOUR):
        assert held and not copied and alive == [0]


def test_parts_are_read_to_the_cpu_wherever_they_belong(run):
    original = save(run, GRID)
    stored = parts.Stored(run.checkpoint(7), "model")
    part = stored.part("up.weight", torch.empty(10, 6, device="meta"))
    assert part.value.device.type == "cpu" and torch.equal(part.value, original["model/up.weight"])


def _draw(run, before, layout):
    state, mesh = divided_state(layout, seed=99, done=False)
    load_checkpoint(run.checkpoint(before), state, mesh=mesh)
    return torch.rand(3).tolist()


def expected_draw(data_rank, place):
    return torch.rand(3, generator=torch.Generator().manual_seed(1000 + 10 * data_rank + place)).tolist()


def test_generators_come_back_and_new_processes_get_their_own(run):
    save(run, GRID)
    same = run_processes(4, _draw, run, 7, GRID)
    assert same == [expected_draw(rank, place) for rank in range(2) for place in range(2)]
    wider = run_processes(4, _draw, run, 7, FOUR)
    assert wider[:2] == [expected_draw(0, 0), expected_draw(1, 0)]
    assert len({tuple(draw) for draw in wider}) == 4                # nobody repeats another's numbers
    assert wider == run_processes(4, _draw, run, 7, FOUR)           # and they can be repeated
    assert run_processes(1, _draw, run, 7, ONE) == [expected_draw(0, 0)]
    deeper = run_processes(4, _draw, run, 7, LayoutConfig(pipeline=2, tensor=2))
    assert deeper[0] == expected_draw(0, 0) and len({tuple(draw) for draw in deeper}) == 4


def test_the_generator_of_one_process_goes_to_the_first_of_several(run):
    save(run, ONE)
    draws = run_processes(4, _draw, run, 7, GRID)
    assert draws[0] == expected_draw(0, 0) and len({tuple(draw) for draw in draws}) == 4


def _damaged(run, damage):
    """Each file in turn is damaged by process 0 and looked at by all; what each process found and was told."""
    state, mesh = divided_state(TWO, seed=99, done=False)
    path, found = run.checkpoint(9), []
    for file in sorted(path.iterdir()):
        if file.name == "manifest.json":
            continue
        if damage == "tear the manifest":
            file = path / "manifest.json"
        content = file.read_bytes()
        dist.barrier()
        if mesh.data_rank == 0:
            DAMAGE[damage](file, content)
        dist.barrier()
        before = whole(state)
        with pytest.raises(CheckpointError, match="cannot be trusted") as caught:
            load_checkpoint(path, state, mesh=mesh)
        assert_same(before, whole(state))
        found.append((file.name, latest_valid(run, mesh), str(caught.value)))
        dist.barrier()
        if mesh.data_rank == 0:
            file.write_bytes(content)
    return found


DAMAGE = {"flip": lambda file, content: file.write_bytes(content[:50] + bytes([content[50] ^ 4]) + content[51:]),
          "remove": lambda file, content: file.unlink(),
          "tear the manifest": lambda file, content: file.write_bytes(content[:100])}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_by_all_and_the_older_checkpoint_is_everyones(run, damage):
    save(run, TWO, step=5)
    save(run, TWO, step=9)
    one, other = run_processes(2, _damaged, run, damage)
    assert one == other and len(one) == 9
    for name, found, told in one:
        assert found.step == 5 and len(found.problems) == 1 and name in found.problems[0] and name in told
    assert latest_valid(run).step == 9


def _gone_back(run, spoilt):
    """What each process hashed on the way back past a checkpoint of which one file is damaged, and where it led."""
    state, mesh = divided_state(TWO)
    background = Checkpointer(run, keep_last=9, mesh=mesh)
    for state.step in (5, 9, 12):
        background.save(state, "interval")
    background.wait()
    if mesh.data_rank == 0:
        content = (file := run.checkpoint(9) / spoilt).read_bytes()
        file.write_bytes(content[:50] + bytes([content[50] ^ 4]) + content[51:])
    dist.barrier()
    hashed, real = [], files.sha256
    files.sha256 = lambda path: (hashed.append(path.relative_to(run.checkpoints)), real(path))[1]
    state.spikes.config, state.rewind = SpikeConfig(), Rewind(step=11, first=11, last=13, leaps=3)
    event = go_back(state, background)
    files.sha256 = real
    return event, hashed, run.checkpoint_steps()


def test_the_way_back_is_found_by_all_together(run):
    (event, one, steps), (told, other, _) = run_processes(2, _gone_back, run, "model-00001-of-00002.safetensors")
    assert event == told and (event["checkpoint"], event["to_step"]) == ("step-000005", 5) and steps == [5]
    one, other = ([path for path in hashed if not path.parent.name.startswith(".")] for hashed in (one, other))
    assert len({*one, *other}) == 18 and (len(one), len(other)) == (10, 8), "every file once, by one of them"


def _gone_back_on_a_bad_disk(run):
    state, mesh = divided_state(TWO)
    background = Checkpointer(run, mesh=mesh)
    background.save(state, "interval")
    background.wait()
    state.spikes.config, state.rewind = SpikeConfig(), Rewind(step=11, first=11, last=13, leaps=3)
    if mesh.data_rank == 0:
        files.sha256 = _unreadable
    with pytest.raises(CheckpointError) as caught:
        go_back(state, background)
    return str(caught.value)


def _unreadable(path):
    raise OSError(errno.EIO, "Input/output error", str(path))


def test_a_disk_that_fails_on_the_way_back_is_everyones_error(run):
    said, said_too = run_processes(2, _gone_back_on_a_bad_disk, run, timeout_s=30)
    assert said == said_too and "process 0 of 2" in said and "Input/output error" in said


def _disk_full(run, layout, rank, real=sharded.write_parts):
    state, mesh = divided_state(layout)
    background = Checkpointer(run, mesh=mesh)
    before = whole(state)

    def full(path, tensors):
        if dist.get_rank() == rank:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    sharded.write_parts = full
    background.save(state, "interval")
    while background._thread.is_alive():
        time.sleep(0.01)
    assert background.poll() == []      # told where all processes meet, not whenever a thread ends
    with pytest.raises(DougongError) as caught:
        background.wait()
    assert_same(before, whole(state))
    names = {p.name for p in run.checkpoints.iterdir()}
    dist.barrier()
    sharded.write_parts = real
    background.save(state, "interval")
    saved, = background.wait()
    return str(caught.value), names, saved.step


@pytest.mark.parametrize("rank", [0, 1])
def test_one_full_disk_is_no_checkpoint_and_everyones_error(run, rank):
    save(run, TWO, step=5)
    for error, names, step in run_processes(2, _disk_full, run, TWO, rank):
        assert f"process {rank} of 2" in error and "the disk is full" in error
        assert names == {"step-000005"} and step == 7
    assert latest_valid(run).step == 7


def _killed(run, layout, moment):
    state, mesh = divided_state(layout)
    state.step = 9
    background = Checkpointer(run, mesh=mesh)
    if dist.get_rank() == 1:
        def die(*arguments):
            if moment == "after its part":
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        real, sharded.write_parts = sharded.write_parts, die
    background.save(state, "interval")
    try:
        background.wait()
    except CheckpointError as error:
        Path(run.path, "told").write_text(str(error))
        os._exit(0)     # as a launcher would end the rest
    return "saved"


@pytest.mark.parametrize("moment", ["before its part", "after its part"])
def test_a_process_killed_while_saving_leaves_the_checkpoint_before(run, moment):
    save(run, TWO, step=5)
    with pytest.raises(AssertionError, match="-9"):
        run_processes(2, _killed, run, TWO, moment)
    assert "a process was lost" in (run.path / "told").read_text()
    found = latest_valid(run)
    assert found.step == 5 and not found.problems
    assert run.checkpoint_steps() == [5]
    Checkpointer(run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000005"]


def _while_training(run, layout):
    """Saves in the background while weights move and the default group is kept busy, as by steps."""
    state, mesh = divided_state(layout)
    moved, real = threading.Event(), sharded.write_parts
    sharded.write_parts = lambda *arguments: (moved.wait(10), real(*arguments))[1]
    background = Checkpointer(run, keep_last=2, keep_every=4, keep_best=False, mesh=mesh)
    moments = []
    for step in range(1, 10):
        state.step = step
        background.wait()
        moved.clear()
        background.save(state, "interval")
        moments.append(whole(state))
        with torch.no_grad():
            for p in state.model.parameters():
                p.add_(1.0)
        moved.set()
        for _ in range(20):
            dist.all_reduce(torch.ones(1000))
    background.wait()
    return moments[-1], run.checkpoint_steps()


def test_the_moment_is_saved_while_training_goes_on_and_few_are_kept(run):
    (held, steps), (more, _) = run_processes(2, _while_training, run, TWO)
    assert steps == [4, 8, 9]
    moment = together([held, more])
    (found, _), = run_processes(1, _hop, run, 9, ONE, 10)
    assert_same(moment, found)


def _refused(run, rows):
    state, mesh = divided_state(TWO, seed=99, done=False, rows=rows)
    if dist.get_rank() == 1:
        state.loader.load_state_dict = _other_data
    before = whole(state)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(run.checkpoint(7), state, mesh=mesh)
    if rows != 11:
        assert_same(before, whole(state))
    return str(caught.value)


def _other_data(state):
    raise CheckpointError("other data")


@pytest.mark.parametrize(("rows", "reason"), [(13, "(11, 6) in the checkpoint, (13, 6) here"),
                                              (11, "process 1 of 2: other data")])
def test_what_one_process_refuses_all_refuse(run, rows, reason):
    save(run, ONE)
    said, said_too = run_processes(2, _refused, run, rows)
    assert said == said_too
    assert reason in said


def _averaged(layout):
    """A lagged copy of parts: after updates, swapped in, and swapped back."""
    state, _ = divided_state(layout)
    own, lagged = whole(state), state.shadow
    with torch.no_grad():
        for p in state.model.parameters():
            p.mul_(-2.0)
    moved = {name: t for name, t in whole(state).items() if name.startswith("model/")}
    lagged.update(state.model, 2)
    with lagged.swapped(state.model):
        inside = whole(state)
    return own, moved, whole(state), inside


def test_an_average_of_parts_is_the_average_and_changes_places_with_them():
    own, moved, after, inside = run_processes(4, _averaged, GRID)[0]
    tau = 1 / 3      # of the second update, while the start is being forgotten
    for name, value in moved.items():
        lagged = name.replace("model/", "shadow/")
        if value.is_floating_point():
            torch.testing.assert_close(after[lagged], own[lagged].lerp(value, max(0.25, tau)), rtol=0, atol=0)
        assert torch.equal(after[name], value)
        assert torch.equal(inside[name], after[lagged]) and torch.equal(inside[lagged], value), name


def holding(**boxes):
    return {("model", name): (box, (4, 4), 4 * box[1][0] * box[1][1]) for name, box in boxes.items()}, []


def test_copies_cut_differently_are_written_once_and_holes_are_refused():
    rows = [holding(w=((0, 0), (2, 4))), holding(w=((2, 0), (2, 4)))]
    columns = [holding(w=((0, 0), (4, 2))), holding(w=((0, 2), (4, 2)))]
    tasks = share_out(rows + columns)
    assert sum(rank_size[("model", "w")][2] for (rank_size, _), task in zip(rows + columns, tasks) if task.keys) == 64
    writers = [bool(task.keys) for task in tasks]
    assert writers in ([True, True, False, False], [False, False, True, True])
    with pytest.raises(CheckpointError, match="do not make up"):
        share_out(rows[:1])


def _lying():
    mesh = divided_state(TWO)[1]
    wrong = DTensor.from_local(torch.ones(2, 2), mesh.devices, [torch.distributed.tensor.Shard(0)], run_check=False,
                               shape=torch.Size((8, 2)), stride=(2, 1))
    with pytest.raises(CheckpointError, match="cannot be saved"):
        parts.box(wrong)


def test_a_tensor_that_is_not_placed_as_it_says_is_not_saved():
    run_processes(2, _lying)
