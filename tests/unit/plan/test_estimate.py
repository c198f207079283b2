"""The plan's sums, against what training really holds."""

import pytest
import torch
from torch import nn

from dougong.models import count
from dougong.models.families.nano import NanoConfig
from dougong.optim import OPTIMIZERS
from dougong.plan import estimate
from dougong.plan.estimate import OPTIMIZER_COPIES


def planned(**changes):
    return estimate(**{"parameters": 1000, "flops_per_token": 6000.0, "tokens_per_step": 64, "steps": 10,
                       "optimizer": "adamw", "ema": False, "activations_bytes": 500, "logits_bytes": 300,
                       "checkpoints_kept": 3} | changes)


def test_parts_add_up():
    plan = planned()
    assert (plan.weights_bytes, plan.gradients_bytes, plan.optimizer_bytes) == (4000, 4000, 8000)
    assert plan.memory_bytes == 4000 + 4000 + 8000 + 500 + 300
    assert plan.flops_total == 10 * plan.flops_per_step == 10 * 6000 * 64
    assert plan.disk_bytes == 3 * plan.checkpoint_bytes == 3 * 12_000
    assert planned(ema=True).weights_bytes == 8000 and planned(ema=True).checkpoint_bytes == 16_000
    assert plan.to_dict()["memory_bytes"] == plan.memory_bytes


def test_every_optimizer_is_known():
    assert OPTIMIZER_COPIES.keys() == set(OPTIMIZERS)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_the_optimizers_bytes_are_at_least_those_it_holds(kind):
    """Muon holds one copy of its matrices and AdamW's two of the rest, so its figure is a lower bound that a deep
    model comes near."""
    config = NanoConfig(vocab_size=64, context=16, dim=64, num_layers=4, num_heads=2, ffn_dim=256)
    model: nn.Module = config.build()
    model.initialise(0)
    optimizer = OPTIMIZERS[kind]().build(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(t.nbytes for slots in optimizer.state.values() for t in slots.values()
               if isinstance(t, torch.Tensor) and t.dim())
    parameters = count.parameters(config)["total"]
    assert parameters == sum(p.numel() for p in model.parameters())
    told = planned(parameters=parameters, optimizer=kind).optimizer_bytes
    assert told <= held * 1.001 + 1 and held <= 1.25 * told + 1 if kind != "sgd" else held == 0
