"""The dry run's sums, and operations against PyTorch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dougong.adapt.lora import LoRAConfig, trained_matrices
from dougong.models import count
from dougong.models.families.llama import LlamaConfig
from dougong.models.families.nano import NanoConfig
from dougong.nn.attention_kernels import explicit
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim import OPTIMIZERS
from dougong.plan import estimate
from dougong.plan.step import Step, step_memory


def planned(**changes):
    return estimate(**{"parameters": 1000, "flops_per_token": 6000.0, "tokens_per_step": 64, "steps": 10,
                       "ema": False, "checkpoints_kept": 3,
                       "counted": {"weights": 4000, "gradients": 100, "optimizer": 8000, "activations": 500,
                                   "temporary": 30, "inputs": 6}} | changes)


def test_parts_add_up():
    plan = planned()
    assert plan.memory_bytes == 4000 + 100 + 8000 + 500 + 36
    assert plan.flops_total == 10 * plan.flops_per_step == 10 * 6000 * 64
    assert plan.disk_bytes == 3 * plan.checkpoint_bytes == 3 * 12_000
    assert planned(ema=True).checkpoint_bytes == 16_000
    assert plan.to_dict()["memory_bytes"] == plan.memory_bytes


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_checkpoints_bytes_are_those_of_weights_and_optimizer(kind):
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
    step = Step(config, CausalLMConfig(), OPTIMIZERS[kind](), micro_rows=2)
    plan = planned(parameters=parameters, counted=step_memory(step).kinds)
    assert plan.checkpoint_bytes == pytest.approx(4 * parameters + held, rel=1e-3)


def counted_by_pytorch(model, T):
    model.initialise(0)
    for module in model.modules():
        if hasattr(module, "kernel"):
            module.kernel = explicit
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, T, dtype=torch.long)).float().sum().backward()
    return counter.get_total_flops()


def hidden_scores(section, T):
    """PyTorch counts every score; the plan half of them, as a causal query reads half of the context on average."""
    heads, _, width = section.attention.heads(section.dim)
    return 2 * T * 6 * section.num_layers * T * heads * width


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("also", [(), ("stem.tokens.weight",), ("stem.tokens.weight", "*down*")], ids=str)
def test_operations_of_an_adapter_are_those_that_pytorch_counts(tied, also):
    config = LlamaConfig(vocab_size=512, context=64, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=192,
                         tied=tied)
    targets = ("*.attention.*", "*.up*", "*.gate*")
    model = LoRAConfig(rank=4, targets=targets, also=also).apply(config.build(), seed=0)
    factors, whole = trained_matrices(model)
    told = count.flops_per_token(config, 64, adapter=factors, whole=whole)
    assert counted_by_pytorch(model, 64) == pytest.approx(2 * 64 * told + hidden_scores(config.decoder(), 64), rel=0.03)


@pytest.mark.parametrize("config", [
    LlamaConfig(vocab_size=512, context=64, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=192),
    NanoConfig(vocab_size=256, context=32, dim=64, num_layers=2, num_heads=2, ffn_dim=256)], ids=lambda c: c.kind)
def test_operations_are_those_that_pytorch_counts(config):
    T = config.context
    told = 2 * T * count.flops_per_token(config, T) + hidden_scores(config.decoder(), T)
    assert counted_by_pytorch(config.build(), T) == pytest.approx(told, rel=0.02)
