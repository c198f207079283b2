"""Experts on several processes compute what they compute on one."""

import pytest
import torch
from matrix import CPU, Case, check, decoder, divided, reference
from processes import run_processes

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.nn.moe import MoE, MoEConfig
from dougong.parallel.expert import divide_experts, why_not_experts
from dougong.runtime.layout import COPIES, LayoutConfig
from dougong.runtime.mesh import Mesh

MOE = MoEConfig(num_experts=8, top_k=2, ffn_dim=16, shared_experts=1, score="sigmoid", balance_rate=0.05)
CASES = {
    "balanced, shared": Case(model=decoder(feed_forward=MOE), steps=3),
    "packed, micro-batches": Case(model=decoder(feed_forward=replace(MOE, balance="none", score="softmax")),
                                  packed=True, micro_batches=2),
    "checkpointed": Case(model=decoder(feed_forward=MOE), checkpoint_activations="full"),
    "width without a grouped kernel": Case(model=decoder(feed_forward=replace(MOE, ffn_dim=7, shared_experts=0))),
}
ROWS = [(name, LayoutConfig(expert=2, replicate=1)) for name in CASES]
ROWS += [("balanced, shared", LayoutConfig(expert=4, replicate=1)),
         ("balanced, shared", LayoutConfig(expert=2, replicate=2)),
         ("balanced, shared", LayoutConfig(expert=2, shard=2, replicate=1)),
         ("packed, micro-batches", LayoutConfig(expert=2, shard=2, replicate=1)),
         ("packed, micro-batches", LayoutConfig(expert=2, context=2, replicate=1)),
         ("balanced, shared", LayoutConfig(shard=2, replicate=1)),
         ("balanced, shared", LayoutConfig(replicate=2)),
         ("packed, micro-batches", LayoutConfig(context=2, replicate=1))]


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
