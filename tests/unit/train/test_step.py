"""Accumulation, groups, clipping, skipping: one step seen from all sides; gradients are compared."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_training import (
    OBJECTIVE,
    RUNTIME,
    CountingLoader,
    TinyLM,
    assert_same,
    flat,
    tiny_config,
    tiny_state,
)
from torch import nn

from dougong.core.errors import ConfigError, DougongError
from dougong.data.batch import Batch
from dougong.objectives import OBJECTIVES
from dougong.optim.build import SGDConfig
from dougong.train.loop import fit
from dougong.train.state import TrainState
from dougong.train.step import check_additive, plain_gradients, take_step


def mean_gradients(model, batches, weight):
    model.zero_grad()
    plain_gradients(model, OBJECTIVE, batches, weight, RUNTIME)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_accumulation_equals_the_whole_batch_to_1e_12(rows):
    model, batch = TinyLM().double(), next(iter(CountingLoader(rows=10)))
    weight = OBJECTIVE.weight(batch)
    whole = mean_gradients(model, [batch], weight)
    parts = mean_gradients(model, batch.split(rows), weight)
    logits = model(batch["tokens"])
    each = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    mean = (each * batch["weight"].flatten()).sum() / batch["weight"].sum()
    for (name, _), reference in zip(model.named_parameters(),
                                    torch.autograd.grad(mean, list(model.parameters()))):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(whole[name], reference, rtol=1e-11, atol=1e-13)


def test_a_step_reports_means_over_its_weight_whatever_the_portions():
    results = []
    for micro_rows in (None, 2):
        state = tiny_state(dropout=0.0)
        batch = next(iter(state.loader))
        results.append(take_step(state, OBJECTIVE, batch, RUNTIME, micro_rows=micro_rows, clip_norm=1.0,
                                 weight=OBJECTIVE.weight(batch)))
    whole, parts = results
    assert whole.metrics["loss"] == pytest.approx(parts.metrics["loss"], rel=1e-6)
    assert whole.grad_norm == pytest.approx(parts.grad_norm, rel=1e-5)
    logits = tiny_state(dropout=0.0).model(batch["tokens"])
    each = nn.functional.cross_entropy(logits.mT, batch["targets"], reduction="none")
    correct = (logits.argmax(-1) == batch["targets"]).float()
    for name, value in (("loss", each), ("accuracy", correct)):
        mean = (value * batch["weight"]).sum() / batch["weight"].sum()
        assert whole.metrics[name] == pytest.approx(float(mean), rel=1e-6)
    assert whole.tokens == 30 and whole.weight == batch["weight"].sum()


@pytest.mark.parametrize("limit", [0.0, 1e-3, 100.0])
def test_clipping_scales_to_the_limit_and_never_up(limit):
    state = tiny_state(dropout=0.0, ema=False, optimizer=SGDConfig(lr=1.0))
    state.schedule = lambda step: 1.0
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    batch = next(iter(state.loader))
    result = take_step(state, OBJECTIVE, batch, RUNTIME, micro_rows=None, clip_norm=limit,
                       weight=OBJECTIVE.weight(batch))
    moved = torch.cat([(p.detach() - before[name]).flatten() for name,
                       p in state.model.named_parameters()]).norm()
    expected = min(limit, result.grad_norm) if limit else result.grad_norm
    assert float(moved) == pytest.approx(expected, rel=1e-3)


class Game(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(noise_dim=3)
        self.generator = nn.Linear(3, 4)
        self.discriminator = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def test_each_parameter_group_gets_the_gradient_of_its_own_loss_only():
    torch.manual_seed(0)
    model, objective = Game().double(), OBJECTIVES["gan"]().build()
    batch = Batch(pixels=torch.randn(6, 4).double())
    torch.manual_seed(5)
    plain_gradients(model, objective, [batch], 6.0, RUNTIME)
    torch.manual_seed(5)
    losses = objective.losses(model, batch)
    for group in ("generator", "discriminator"):
        parameters = list(model.get_submodule(group).parameters())
        wanted = torch.autograd.grad(losses.sums[group] / 6, parameters, retain_graph=True)
        for p, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)


def test_what_does_not_add_is_not_split_and_the_reason_is_given():
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for model, kind, reason in ((norm, "classify", "normalises over the batch"), (Game(), "gan", "noise")):
        objective = OBJECTIVES[kind]().build()
        check_additive(model, objective, 8, None)
        check_additive(model, objective, 8, 8)
        with pytest.raises(ConfigError, match=reason):
            check_additive(model, objective, 8, 4)
    with pytest.raises(ConfigError, match="normalises"):
        state = TrainState(norm, SGDConfig().build(norm), lambda step: 1.0,
                           [Batch(pixels=torch.zeros(8, 2), labels=torch.zeros(8, dtype=torch.long))])
        next(fit(state, OBJECTIVES["classify"]().build(), RUNTIME, tiny_config(micro_rows=4)))


def test_a_step_with_a_non_finite_loss_moves_nothing_and_is_counted():
    state = tiny_state(spoil={1})
    steps = fit(state, OBJECTIVE, RUNTIME, tiny_config(max_skips=3))
    assert next(steps).skipped is None
    before = {k: v for k, v in flat(state).items() if not k.startswith("rng")}
    result = next(steps)
    assert "loss" in result.skipped and state.skips == 1 and state.step == 2
    assert_same(before, {k: v for k, v in flat(state).items() if not k.startswith("rng")})
    assert next(steps).skipped is None and state.skips == 0


def test_a_non_finite_gradient_under_a_finite_loss_is_skipped_too():
    state = tiny_state(dropout=0.0)
    state.model.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    assert "gradient norm" in next(fit(state, OBJECTIVE, RUNTIME, tiny_config())).skipped


def test_running_statistics_survive_a_spoilt_batch():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    labels = torch.zeros(4, dtype=torch.long)
    batches = [Batch(pixels=torch.full((4, 2), torch.nan), labels=labels),
               Batch(pixels=torch.rand(4, 2), labels=labels)]
    state = TrainState(model, SGDConfig().build(model), lambda step: 1.0, batches)
    first, second = fit(state, OBJECTIVES["classify"]().build(), RUNTIME, tiny_config(2))
    assert first.skipped and not second.skipped
    assert model[0].running_mean.isfinite().all() and model[0].num_batches_tracked == 1


def test_too_many_skips_end_training_and_save_the_batch(tmp_path):
    from safetensors.torch import load_file

    state = tiny_state(spoil=range(2, 99))
    with pytest.raises(DougongError, match="4 steps in a row") as stopped:
        list(fit(state, OBJECTIVE, RUNTIME, tiny_config(max_skips=3), directory=tmp_path))
    assert state.step == 6 and "optim.lr" in str(stopped.value)
    saved = load_file(tmp_path / "offending-batch-000006.safetensors")
    loader = CountingLoader(spoil={5})
    loader.position = 5
    for name, tensor in next(iter(loader)).items():
        assert torch.equal(saved[name], tensor)


def test_a_batch_without_weight_is_skipped():
    state = tiny_state()
    batch = next(iter(state.loader))
    state.loader = [Batch(**{**batch, "weight": torch.zeros_like(batch["weight"])})]
    assert "no weight" in next(fit(state, OBJECTIVE, RUNTIME, tiny_config())).skipped


def test_the_schedule_multiplies_each_groups_own_rate():
    state = tiny_state(steps=10)
    for step, _ in enumerate(fit(state, OBJECTIVE, RUNTIME, tiny_config(10))):
        for group in state.optimizer.param_groups:
            assert group["lr"] == group["initial_lr"] * state.schedule(step)


def test_training_learns_and_a_stop_ends_it_after_the_step():
    state = tiny_state(steps=300, dropout=0.0)
    batch = next(iter(CountingLoader()))
    state.loader = [batch] * 300
    losses = [result.metrics["loss"] for result in fit(state, OBJECTIVE, RUNTIME, tiny_config(300))]
    assert losses[-1] < 0.5 * losses[0]
    state = tiny_state()
    for result in fit(state, OBJECTIVE, RUNTIME, tiny_config()):
        if result.step == 4:
            state.stop = "early stop"
    assert state.step == 4


def test_the_phases_of_a_step_add_up_to_its_time_and_name_what_was_slow(monkeypatch):
    import gc

    from dougong.train.phases import Clock

    now, collect = [100.0], gc.collect
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds, work=lambda *a, **k: None):      # a time that only this test moves: nothing here waits
        def spending(*args, **kwargs):
            now[0] += seconds
            return work(*args, **kwargs)
        return spending

    objective, clock, state = OBJECTIVE, Clock(), tiny_state(ema=False, optimizer=SGDConfig(lr=0.1))
    monkeypatch.setattr(type(objective), "weight", spend(0.5, type(objective).weight))
    monkeypatch.setattr(type(objective), "losses", spend(2.0, type(objective).losses))
    monkeypatch.setattr(gc, "collect", spend(0.25, collect))
    state.model.norm.weight.register_hook(spend(4.0))
    state.optimizer.step = spend(16.0, state.optimizer.step)
    results = []
    for result in fit(state, objective, RUNTIME, tiny_config(4, micro_rows=3, gc_every=2), clock=clock):
        results.append(result)
        spend(64.0)()
        with clock("evaluation"):
            spend(32.0)()
    step = {"data": 0.5, "forward": 4.0, "backward": 8.0, "optimizer": 16.0}        # two micro-batches
    between = {"evaluation": 32.0, "other": 64.0}
    for result, garbage, before in zip(results, [{}, {"gc": 0.25}] * 2, [{}, between, between, between], strict=True):
        assert result.seconds == sum(step.values()) + sum(garbage.values())
        assert result.phases == {**step, **garbage, **before}
    assert clock.step == 4 and state.elapsed_s == sum(result.seconds for result in results)


def test_garbage_is_collected_every_so_many_steps_and_python_gets_its_way_back(monkeypatch):
    import gc

    collected, real = [], gc.collect
    monkeypatch.setattr(gc, "collect", lambda *a: (collected.append(state.step), real(*a))[1])
    state = tiny_state()
    for _ in fit(state, OBJECTIVE, RUNTIME, tiny_config(7, gc_every=3)):
        assert not gc.isenabled()
    assert collected == [0, 3, 6] and gc.isenabled()
    steps = fit(state := tiny_state(), OBJECTIVE, RUNTIME, tiny_config(7, gc_every=3))
    next(steps)
    steps.close()
    assert gc.isenabled(), "a loop that is left early leaves the collector off"


def test_layer_norms_are_those_of_the_layers_and_make_up_the_whole():
    from dougong.train.layers import Layers

    state = tiny_state(dropout=0.0)
    batch = next(iter(state.loader))
    result = take_step(state, OBJECTIVE, batch, RUNTIME, micro_rows=None, clip_norm=0.0,
                       weight=OBJECTIVE.weight(batch))
    model = tiny_state(dropout=0.0).model
    plain_gradients(model, OBJECTIVE, [batch], OBJECTIVE.weight(batch), RUNTIME)
    assert set(result.layers) == {"embedding", "stack.0", "stack.1", "norm"} == set(Layers(model, RUNTIME.mesh).names)
    for name, norm in result.layers.items():
        parts = [p.grad.flatten() for p in model.get_submodule(name).parameters()]
        assert norm == pytest.approx(float(torch.cat(parts).norm()), rel=1e-5)
    assert sum(norm**2 for norm in result.layers.values()) == pytest.approx(result.grad_norm**2, rel=1e-5)
