"""Experts on several processes compute what they compute on one."""

import pytest
import torch
from divided_state import Place, _leave_traces, assert_same, together, whole
from matrix import CPU, Case, check, decoder, divided, reference
from processes import run_processes

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.core.run import RunDirectory
from dougong.models import FAMILIES
from dougong.nn.init import initialise
from dougong.nn.moe import MoE, MoEConfig
from dougong.optim.build import MuonConfig
from dougong.parallel import data
from dougong.parallel.expert import divide_experts, why_not_experts
from dougong.parallel.parallelize import parallelize
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig
from dougong.train.checkpoint import load_checkpoint, save_checkpoint
from dougong.train.shadow import Shadow
from dougong.train.state import TrainState

MOE = MoEConfig(num_experts=8, top_k=2, ffn_dim=16, shared_experts=1, score="sigmoid", balance_rate=0.05)
CASES = {
    "balanced, shared": Case(model=decoder(feed_forward=MOE), steps=3),
    "packed, micro-batches": Case(model=decoder(feed_forward=replace(MOE, balance="none", score="softmax")),
                                  packed=True, micro_batches=2),
    "checkpointed": Case(model=decoder(feed_forward=MOE), checkpoint_activations="full", steps=3),
    "width without a grouped kernel": Case(model=decoder(feed_forward=replace(MOE, ffn_dim=7, shared_experts=0))),
    "four layers": Case(model=decoder(feed_forward=MOE, num_layers=4, tied=False), micro_batches=4),
    "muon": Case(model=decoder(feed_forward=MOE), optimizer=MuonConfig(lr=1e-2, eps=1e-3)),
}
ROWS = [(name, LayoutConfig(expert=2, replicate=1)) for name in CASES if name not in ("muon", "four layers")]
ROWS += [("balanced, shared", LayoutConfig(expert=4, replicate=1)),
         ("balanced, shared", LayoutConfig(expert=2, replicate=2)),
         ("muon", LayoutConfig(expert=2, shard=2, replicate=1)),
         ("packed, micro-batches", LayoutConfig(expert=2, shard=2, replicate=1)),
         ("packed, micro-batches", LayoutConfig(expert=2, context=2, replicate=1)),
         ("four layers", LayoutConfig(pipeline=2, expert=2, replicate=1, schedule="interleaved_zb")),
         ("balanced, shared", LayoutConfig(shard=2, replicate=1)),
         ("balanced, shared", LayoutConfig(replicate=2)),
         ("balanced, shared", LayoutConfig(context=2, replicate=1))]


@pytest.fixture(scope="module")
def references():
    known = {}

    def of(name):
        if name not in known:
            known[name] = reference(CASES[name])
        return known[name]
    return of


@pytest.mark.parametrize(("name", "layout"), ROWS, ids=lambda value: str(value))
def test_divided_experts_give_the_same_losses_gradients_and_weights(name, layout, references):
    check(references(name), run_processes(layout.processes, divided, CASES[name], layout))


def test_large_gradients_are_summed_where_they_lie(references, monkeypatch):
    """Here all matrices of the experts are large, and what a process holds of a router's bias is not."""
    monkeypatch.setattr(data, "_LARGE", 64)
    layout = LayoutConfig(expert=2, replicate=2)
    check(references("balanced, shared"), run_processes(4, divided, CASES["balanced, shared"], layout))


def _biases(case, layout):
    models = []
    divided(case, layout, fault=models.append)
    return torch.stack([layer.balance_bias for layer in models[0].modules() if isinstance(layer, MoE)])


@pytest.mark.parametrize("layout", [LayoutConfig(expert=2, context=2, replicate=1), LayoutConfig(replicate=2)], ids=str)
def test_all_processes_agree_on_the_balance_of_the_global_batch(layout):
    case = CASES["balanced, shared"]
    alone = _biases(case, LayoutConfig(replicate=1))
    assert alone.abs().max() >= 0.1, "three steps of 0.05 each"
    for biases in run_processes(layout.processes, _biases, case, layout):
        assert torch.equal(biases, alone)


def _one_expert(expert):
    """Outputs and gradients where every token wants the same expert, so that a process has none of them."""
    mesh = Runtime.start(CPU, LayoutConfig(expert=2, replicate=1)).mesh
    layer = MoEConfig(num_experts=4, top_k=1, ffn_dim=8).build(dim=16)
    initialise(layer, 0)
    layer.balance_bias[expert] = 10.0
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(mesh.rank("expert")))
    results = []
    for _ in range(2):
        y = layer(x)
        layer.zero_grad()
        y.square().sum().backward()
        results.append((y.detach(), layer.experts.gate.grad))
        layer.config = FAMILIES["decoder"](feed_forward=layer.section)
        if layer.exchange is None:
            divide_experts(layer, mesh)
    (whole, gradient), (parts, part) = results
    return torch.equal(whole, parts), gradient, part.to_local()


@pytest.mark.parametrize("expert", [0, 3])
def test_a_process_whose_experts_nobody_wants_takes_part(expert):
    (same_0, gradient_0, part_0), (same_1, gradient_1, part_1) = run_processes(2, _one_expert, expert)
    assert same_0 and same_1
    torch.testing.assert_close(torch.cat([part_0, part_1]), gradient_0 + gradient_1)


@pytest.mark.parametrize(("model", "expert", "tensor", "reason"), [
    (decoder(feed_forward=MOE), 4, 1, None),
    (decoder(feed_forward=MOE), 3, 1, "Try layout.expert=2"),
    (decoder(feed_forward=MOE), 2, 2, "Try layout.tensor=1"),
    (decoder(), 2, 1, "model.kind=decoder has none"),
    (FAMILIES["cnn"](num_classes=3), 2, 1, "model.kind=cnn has none"),
])
def test_what_cannot_be_divided_is_refused_with_the_reason(model, expert, tensor, reason):
    found = why_not_experts(model, expert, tensor)
    assert found is None if reason is None else reason in found


def _state(layout, seed):
    """A training state whose experts are divided by `layout`, with the traces of some steps, and its mesh."""
    runtime, case = Runtime.start(CPU, layout), CASES["balanced, shared"]
    with torch.device("meta"):
        model = case.model.build()
    model = parallelize(model, case.objective.build(), runtime).model.to_empty(device="cpu")
    model.initialise(seed)
    state = TrainState(model, case.optimizer.build(model), lambda step: 1.0, Place(), Shadow(model, tau=0.25))
    _leave_traces(state)
    return state, runtime.mesh


def _saved(run, layout):
    state, mesh = _state(layout, seed=0)
    save_checkpoint(run, state, mesh=mesh)
    return whole(state)


def _loaded(path, layout):
    state, mesh = _state(layout, seed=1)
    load_checkpoint(path, state, mesh=mesh)
    return whole(state)


def test_a_checkpoint_of_divided_experts_loads_into_any_layout(tmp_path):
    run, layout = RunDirectory(tmp_path / "run"), LayoutConfig(expert=2, shard=2, replicate=1)
    saved = together(run_processes(4, _saved, run, layout))
    assert saved["model/stack.0.feed_forward.experts.gate"].shape == (8, 16, 32)
    assert saved["model/stack.0.feed_forward.balance_bias"].tolist() == [2.0] * 8
    for layout in (LayoutConfig(replicate=1), LayoutConfig(expert=4, replicate=1), LayoutConfig(expert=2, replicate=2)):
        parts = run_processes(layout.processes, _loaded, run.checkpoint(7), layout)
        assert_same(saved, together(parts))


def _refused():
    model = decoder(feed_forward=replace(MOE, num_experts=5)).build()
    with pytest.raises(ConfigError, match="num_experts=5"):
        divide_experts(model, Runtime.start(CPU, LayoutConfig(expert=2, replicate=1)).mesh)
    return True


def test_a_model_that_does_not_fit_is_left_alone():
    assert all(run_processes(2, _refused))
