"""Muon against torch.optim.Muon and against the singular value decomposition."""

import pytest
import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.optim.build import MuonConfig
from dougong.optim.groups import describe, table
from dougong.optim.muon import orthogonalise


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        # a tall and a wide matrix, of transposed shapes
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 6)
        self.c, self.d = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 7, bias=False)


def with_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torchs_muon_and_adamw(monkeypatch, scale, nesterov):
    # torch computes the iteration in bf16 always; in fp32 the comparison can be sharp
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    optimizer = MuonConfig(lr=0.05, weight_decay=0.1, scale=scale, nesterov=nesterov, adamw_lr=0.01,
                           adamw_weight_decay=0.2).build(ours)
    matrices = [theirs.a.weight, theirs.b.weight, theirs.c.weight, theirs.d.weight]
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1, adjust_lr_fn=scale, nesterov=nesterov)
    adamw = torch.optim.AdamW([{"params": [theirs.embedding.weight, theirs.head.weight], "weight_decay": 0.2},
                               {"params": [theirs.a.bias, theirs.b.bias], "weight_decay": 0.0}],
                              lr=0.01, betas=(0.9, 0.95))
    for seed in range(4):
        with_gradients(ours, seed), with_gradients(theirs, seed)
        optimizer.step(), muon.step(), adamw.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 20), (2, 20, 8)])
def test_orthogonalising_brings_singular_values_near_one_and_keeps_the_vectors(shape):
    # condition number 10: five steps promise about [0.7, 1.2] (the post) for singular values of that size
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, 0.1, min(shape[1:]), dtype=torch.float64)
    result = orthogonalise(u * values @ vh)
    inside = u.mT @ result @ vh.mT
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.25)).all()
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), rtol=0, atol=1e-10)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_cautious_decay_falls_only_where_the_update_shrinks():
    net = Net()
    optimizer = MuonConfig(lr=0.1, weight_decay=0.5, cautious=True, momentum=0.0, nesterov=False).build(net)
    before = net.c.weight.detach().clone()
    with_gradients(net, 0)
    update = orthogonalise(net.c.weight.grad[None])[0]
    optimizer.step()
    decayed = torch.where(before * update > 0, before * (1 - 0.1 * 0.5), before)
    torch.testing.assert_close(net.c.weight.detach(), decayed - 0.1 * update)


def test_only_hidden_matrices_take_muon():
    rows = describe(MuonConfig(adamw=("c.*",)).build(Net()))
    muon = [name for row in rows if row["optimizer"] == "muon" for name in row["names"]]
    assert muon == ["a.weight", "b.weight", "d.weight"]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in Net().parameters())


def test_a_tied_borrowed_embedding_takes_adamw():
    from dougong.models.families.qwen3 import Qwen3Config

    model = Qwen3Config(vocab_size=64, context=16, dim=32, num_layers=2, num_heads=2, num_kv_heads=1).build()
    muon = [n for row in describe(MuonConfig().build(model)) if row["optimizer"] == "muon"
            for n in row["names"]]
    assert muon and not any("tokens" in name or "head" in name or "norm" in name for name in muon)


def test_heads_of_values_and_of_a_discriminator_take_adamw():
    from dougong.models.families.gan import GANConfig
    from dougong.models.families.qwen3 import Qwen3Config
    from dougong.models.heads import add_value_head

    judge = Qwen3Config(vocab_size=64, context=16, dim=32, num_layers=2, num_heads=2, num_kv_heads=1).build()
    add_value_head(judge, 2)
    for model, head in ((judge, "value.weight"), (GANConfig(image_size=8).build(), "discriminator.head.weight")):
        kinds = {name: row["optimizer"] for row in describe(MuonConfig().build(model)) for name in row["names"]}
        assert kinds[head] == "adamw" and "muon" in kinds.values()
        assert all(kinds[name] == "muon" for name in kinds if name.endswith("attention.value.weight"))


def test_rates_scale_by_pattern_and_the_table_says_so():
    optimizer = MuonConfig(lr=0.02, rates={"embedding.*": 10.0}, adamw_lr=0.001).build(Net())
    assert {row["lr"] for row in describe(optimizer) if "embedding.weight" in row["names"]} == {0.01}
    assert "embedding.weight" in table(optimizer) and "0.01" in table(optimizer)


def test_a_pattern_that_matches_nothing_is_an_error():
    for section in (MuonConfig(adamw=("sea.*",)), MuonConfig(rates={"x*": 2.0}), MuonConfig(no_decay=("q",))):
        with pytest.raises(ConfigError, match="matches no parameter"):
            section.build(Net())


def test_a_model_without_hidden_matrices_is_told_to_take_adamw():
    with pytest.raises(ConfigError, match="adamw"):
        MuonConfig().build(nn.Sequential(nn.Embedding(3, 2)))


def test_computing_in_bf16_keeps_fp32_momentum():
    net = Net()
    net.compute_dtype = torch.bfloat16
    optimizer = MuonConfig().build(net)
    with_gradients(net, 0)
    optimizer.step()
    assert optimizer.dtype == torch.bfloat16
    assert optimizer.state[net.c.weight]["momentum"].dtype == torch.float32


def test_all_of_a_restored_state_is_where_its_parameter_is():
    """torch's fused AdamW wants its count of steps there; `meta` stands for a device that is not the host."""
    saved = MuonConfig().build(net := Net())
    with_gradients(net, 0)
    saved.step()
    with torch.device("meta"):
        optimizer = MuonConfig().build(Net())
    optimizer.load_state_dict(saved.state_dict())
    places = {name: value.device.type for state in optimizer.state.values() for name, value in state.items()}
    assert places == dict.fromkeys(("momentum", "step", "exp_avg", "exp_avg_sq"), "meta")
