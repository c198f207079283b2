"""A run stopped on some processes goes on with others: the same rows in the same order, state and losses."""

import hashlib

import pytest
import torch
from divided_state import CPU, ONE, assert_same, together, whole
from matrix import decoder
from processes import run_processes

from dougong.core.run import RunDirectory
from dougong.data.prepare import TextData
from dougong.data.tokenizer import BytesConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig, MuonConfig
from dougong.optim.schedules import WSDConfig
from dougong.parallel.parallelize import parallelize
from dougong.runtime import seeds
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig
from dougong.train.checkpoint import latest_valid, load_checkpoint, save_checkpoint
from dougong.train.config import EMAConfig, TrainConfig
from dougong.train.loop import fit
from dougong.train.shadow import Shadow
from dougong.train.state import TrainState

ROWS, STEPS, CONTEXT = 8, 8, 16
OBJECTIVE = CausalLMConfig().build()
ADAMW = AdamWConfig(lr=1e-2, eps=1e-3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of invented words: rows of two kinds of source would differ in nothing but their text."""
    folder = tmp_path_factory.mktemp("texts")
    draw = torch.Generator().manual_seed(0)
    for number in range(60):
        words = torch.randint(97, 123, (80, 5), generator=draw).tolist()
        (folder / f"{number:02d}.txt").write_text(" ".join("".join(map(chr, word)) for word in words))
    return TextData(path=str(folder)).prepare(BytesConfig(), context=CONTEXT, cache=folder / "cache")


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def _train(run, corpus, layout, steps, dropout=0.0, optimizer=ADAMW):
    """Goes on from the newest checkpoint to `steps` and saves; this process's rows and losses of each step, and its
    state at the end."""
    runtime = Runtime.start(CPU, layout)
    mesh = runtime.mesh
    seeds.seed_all(seeds.derive(0, "training", mesh.data_rank))
    with torch.device("meta"):      # 257 bytes and ends, made even
        model = decoder(vocab_size=corpus.tokenizer.vocab_size + 1, context=CONTEXT, dropout=dropout).build()
    micro_batches = 2 if mesh.size("pipeline") > 1 else 1
    parallel = parallelize(model, OBJECTIVE, runtime, micro_batches=micro_batches)
    model = parallel.model.to_empty(device="cpu")
    model.initialise(0)
    loader = corpus.loader("train", rows=ROWS, seed=3, rank=mesh.data_rank, world_size=mesh.data_size)
    state = TrainState(model, optimizer.build(model), WSDConfig(warmup=2, decay=0.5).build(STEPS), loader,
                       Shadow(model, tau=0.1))
    found = latest_valid(run, mesh)
    if found.path:
        load_checkpoint(found.path, state, mesh=mesh)
    config = TrainConfig(steps=steps, micro_rows=ROWS // mesh.data_size // micro_batches, ema=EMAConfig(decay=0.9))
    steps_done = [(result.step, _hashes(result.batch), result.metrics["loss"])
                  for result in fit(state, OBJECTIVE, runtime, config, gradients=parallel.gradients)]
    save_checkpoint(run, state, mesh=mesh)
    loader.close()
    return {"steps": steps_done, "data_rank": mesh.data_rank, "state": whole(state), "rng": torch.rand(4).tolist(),
            "tokens": state.tokens, "position": loader.state_dict()}


def _hashes(batch):
    return [hashlib.sha256(b"".join(batch[name][row].numpy().tobytes() for name in ("tokens", "targets", "weight")))
            .hexdigest() for row in range(batch.rows)]


def train(run, corpus, layout, steps, *options):
    """The same by as many processes as the layout has: rows of each global batch in order, losses, the whole state."""
    parts = run_processes(layout.processes, _train, run, corpus, layout, steps, *options)
    readers = {part["data_rank"]: part for part in parts}
    numbers = [step for step, _, _ in parts[0]["steps"]]
    rows = {step: [row for rank in sorted(readers) for row in readers[rank]["steps"][at][1]]
            for at, step in enumerate(numbers)}
    for part in parts:      # all who read a slice read the same, and all know the loss of the whole batch
        assert [rows for _, rows, _ in part["steps"]] == [rows for _, rows, _ in readers[part["data_rank"]]["steps"]]
    losses = {step: loss for step, _, loss in parts[0]["steps"]}
    return {"rows": rows, "losses": losses, "state": together(part["state"] for part in parts),
            "rng": [part["rng"] for part in parts], "tokens": parts[0]["tokens"], "position": parts[0]["position"]}


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    return train(RunDirectory(tmp_path_factory.mktemp("whole")), corpus, ONE, STEPS)


def continued(run, corpus, legs):
    """Rows and losses of all steps of a run that changes its layout, and its end."""
    rows, losses, end = {}, {}, {}
    for layout, until in legs:
        end = train(run, corpus, layout, until)
        assert not rows.keys() & end["rows"].keys()
        rows, losses = rows | end["rows"], losses | end["losses"]
    return rows, losses, end


@pytest.mark.parametrize("legs", [
    [(LayoutConfig(shard=4), 3), (ONE, STEPS)],
    [(LayoutConfig(shard=4), 3), (LayoutConfig(replicate=2), STEPS)],
    [(LayoutConfig(shard=4), 3), (LayoutConfig(replicate=2, shard=4), STEPS)],
    [(LayoutConfig(shard=2), 2), (LayoutConfig(replicate=2, shard=2), 3), (ONE, 4), (LayoutConfig(tensor=2), 5),
     (LayoutConfig(pipeline=2), 6), (LayoutConfig(shard=2, tensor=2), 7), (LayoutConfig(context=2), STEPS)],
], ids=lambda legs: " → ".join(f"{layout}" for layout, _ in legs))
def test_another_number_of_processes_sees_the_same_rows_and_the_same_losses(run, corpus, uninterrupted, legs):
    rows, losses, end = continued(run, corpus, legs)
    assert rows == uninterrupted["rows"]
    assert len({row for step in rows.values() for row in step}) == STEPS * ROWS     # and none twice
    for step, loss in uninterrupted["losses"].items():
        assert abs(losses[step] - loss) <= 1e-6 * abs(loss), (step, losses[step], loss)     # false for NaN
    assert end["position"] == uninterrupted["position"]


@pytest.mark.parametrize(("layout", "optimizer"), [
    (LayoutConfig(shard=2), ADAMW),
    (LayoutConfig(shard=2), MuonConfig(lr=0.01, adamw_lr=0.01)),
    (LayoutConfig(replicate=2), ADAMW),
    (LayoutConfig(tensor=2), MuonConfig(lr=0.01, adamw_lr=0.01)),
    (LayoutConfig(pipeline=2), ADAMW),
    (LayoutConfig(context=2), ADAMW),
    (LayoutConfig(replicate=2, shard=2), ADAMW),
], ids=lambda value: str(value) if isinstance(value, LayoutConfig) else value.kind)
def test_on_the_same_layout_nothing_shows_that_it_was_interrupted(run, corpus, layout, optimizer, tmp_path):
    """With dropout: every bit of weights, optimiser, average and generators."""
    whole_run = train(RunDirectory(tmp_path / "whole"), corpus, layout, 6, 0.2, optimizer)
    first = train(run, corpus, layout, 3, 0.2, optimizer)
    second = train(run, corpus, layout, 6, 0.2, optimizer)
    assert {**first["losses"], **second["losses"]} == whole_run["losses"]
    assert_same(second["state"], whole_run["state"])
    assert second["rng"] == whole_run["rng"] != first["rng"]
    assert second["tokens"] == whole_run["tokens"] and second["position"] == whole_run["position"]
