"""Every optimiser of the table: it learns, its groups cover the model once, its state survives saving."""

import pytest
import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.optim import OPTIMIZERS
from dougong.optim.groups import describe

RATES = {"adamw": 1e-2, "adam": 1e-2, "sgd": 2e-1, "rmsprop": 3e-3, "muon": 2e-2}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model, step):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
    return (model(x).squeeze(-1) - x[:, 0] * x[:, 1]).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_learns(kind):
    model = net()
    train(model, OPTIMIZERS[kind](lr=RATES[kind]).build(model), range(300))
    with torch.no_grad():
        assert loss_of(model, 999) < 0.5 * loss_of(net(), 999)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_hold_every_parameter_once_and_spare_vectors_from_decay(kind):
    model = net()
    optimizer = OPTIMIZERS[kind](lr=0.1, weight_decay=0.3, no_decay=("2.weight",)).build(model)
    rows = describe(optimizer)
    assert sorted(name for row in rows for name in row["names"]) == sorted(n for n,
                                                                           _ in model.named_parameters())
    decay = {name: row["weight_decay"] for row in rows for name in row["names"]}
    assert decay["0.weight"] == 0.3
    assert decay["0.bias"] == decay["2.weight"] == 0.0
    assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_pattern_without_a_match_is_refused(kind):
    with pytest.raises(ConfigError, match="matches no parameter"):
        OPTIMIZERS[kind](no_decay=("7.*",)).build(net())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_state_goes_on_bit_for_bit(kind):
    whole, half = net(), net()
    one, two = (OPTIMIZERS[kind](lr=1e-2).build(model) for model in (whole, half))
    train(whole, one, range(8)), train(half, two, range(4))
    resumed = net()
    resumed.load_state_dict(half.state_dict())
    three = OPTIMIZERS[kind](lr=1e-2).build(resumed)
    three.load_state_dict(two.state_dict())
    train(resumed, three, range(4, 8))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind,reference", [
    ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)),
    ("adam", lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False)),
    ("sgd", lambda p: torch.optim.SGD(p, lr=1e-2, foreach=False)),
    ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-2, foreach=False))])
def test_fused_kernels_agree_with_torchs_plain_ones(kind, reference):
    ours, theirs = net().double(), net().double()
    options = {"weight_decay": 0.0} if kind == "adamw" else {}
    one, two = OPTIMIZERS[kind](lr=1e-2, **options).build(ours), reference(theirs.parameters())
    for model, optimizer in ((ours, one), (theirs, two)):
        for step in range(5):
            x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step(), optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
