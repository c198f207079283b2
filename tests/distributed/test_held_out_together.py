"""Held-out rows scored by many processes give the figure of one, whatever they share and however the rows come out."""

import pytest
import torch
from matrix import CPU, Case, decoder
from processes import run_processes

from dougong.nn.moe import MoEConfig
from dougong.objectives.preference import ORPOConfig
from dougong.parallel.parallelize import parallelize
from dougong.recipes.held_out import held_out, held_out_together
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig

CASE = Case(packed=True)
EXPERTS = decoder(feed_forward=MoEConfig(num_experts=8, top_k=2, ffn_dim=16))
ROWS = 4


def _batches():
    """Seven batches: no number of processes shares them evenly; the last one is short."""
    *whole, last = (CASE.batch(step).split(ROWS)[0] for step in range(7))
    return [*whole, last.split(3)[0]]


def _pairs():
    return [type(batch)(**{name: batch[name].view(2, 2, -1) for name in ("tokens", "targets", "weight")})
            for batch in _batches()[:5]]


def _alone(objective, batches, *, model=CASE.model, **limits):
    model = model.build()
    model.initialise(0)
    return held_out(objective.build(), model, batches, Runtime.start(CPU), **limits)


def _together(objective, batches, layout, limits, model=CASE.model):
    runtime = Runtime.start(CPU, layout)
    with torch.device("meta"):
        model = model.build()
    built = objective.build()
    parallel = parallelize(model, built, runtime, micro_batches=2)
    parallel.model.to_empty(device="cpu").initialise(0)
    return held_out_together(parallel.losses, built, batches, runtime, rows=ROWS, **limits)


@pytest.mark.parametrize("limits", [{}, {"most_tokens": 5 * ROWS * 16}], ids=["all", "some"])
@pytest.mark.parametrize("layout", [
    LayoutConfig(replicate=2), LayoutConfig(shard=2), LayoutConfig(replicate=2, shard=2), LayoutConfig(tensor=2),
    LayoutConfig(context=2), LayoutConfig(pipeline=2), LayoutConfig(shard=2, tensor=2),
    LayoutConfig(shard=2, pipeline=2)], ids=str)
def test_the_figures_of_one_process(layout, limits):
    expected = _alone(CASE.objective, _batches(), **limits)
    for found in run_processes(layout.processes, _together, CASE.objective, _batches(), layout, limits):
        assert found == pytest.approx(expected, rel=1e-6), layout
    read = _batches()[:5] if limits else _batches()
    assert expected["weight"] == pytest.approx(sum(float(batch["weight"].sum()) for batch in read))
    assert expected["loss"] > 1


def test_experts_in_two_places():
    expected = _alone(CASE.objective, _batches(), model=EXPERTS)
    layout = LayoutConfig(replicate=1, expert=2)
    for found in run_processes(2, _together, CASE.objective, _batches(), layout, {}, EXPERTS):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", [LayoutConfig(replicate=2), LayoutConfig(shard=2)], ids=str)
def test_pairs_whose_rows_cannot_be_without_weight(layout):
    expected = _alone(ORPOConfig(), _pairs())
    for found in run_processes(layout.processes, _together, ORPOConfig(), _pairs(), layout, {}):
        assert found == pytest.approx(expected, rel=1e-6)


def test_no_rows_give_no_figures():
    assert run_processes(2, _together, CASE.objective, [], LayoutConfig(replicate=2), {}) == [{}, {}]
