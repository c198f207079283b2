"""Layouts that divide rows: whole copies (DDP), one copy in parts (FSDP2), and both (HSDP)."""

import pytest
import torch
from matrix import CPU, Case, check, decoder, divided, reference
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models import FAMILIES
from dougong.models.heads import add_value_head
from dougong.objectives import OBJECTIVES
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.objectives.classify_text import ClassifyTextConfig
from dougong.optim.build import MuonConfig
from dougong.parallel.parallelize import check_divisible, parallelize
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig

MUON = Case(model=decoder(num_layers=3), optimizer=MuonConfig(cautious=True, weight_decay=0.1, eps=1e-3))
PACKED = Case(packed=True, micro_batches=2)
UNTIED = Case(model=decoder(tied=False, vocab_size=97, num_layers=3), checkpoint_activations="full")


@pytest.mark.parametrize(("case", "layout"), [
    (PACKED, LayoutConfig(replicate=2)),
    (PACKED, LayoutConfig(shard=2)),
    (PACKED, LayoutConfig(shard=2, gathered="step")),
    (UNTIED, LayoutConfig(shard=4)),
    (PACKED, LayoutConfig(replicate=2, shard=2)),
    (MUON, LayoutConfig(shard=2)),
    (MUON, LayoutConfig(replicate=2, shard=2, tensor=2)),
], ids=lambda value: str(value) if isinstance(value, LayoutConfig) else "")
def test_rows_divided(case, layout):
    check(reference(case), run_processes(layout.processes, divided, case, layout))


class _Judged:
    """A model config whose models have a value head of three outputs."""

    vocab_size = PACKED.model.vocab_size

    def build(self):
        model = PACKED.model.build()
        add_value_head(model, 3)
        return model


class _Texts(Case):
    """Texts of several lengths, each of one of three classes."""

    def batch(self, step):
        tokens = super().batch(step)["tokens"]
        draw = torch.Generator().manual_seed(step)
        return Batch(tokens=tokens, places=torch.randint(2, self.T, (self.rows,), generator=draw),
                     labels=torch.randint(3, (self.rows,), generator=draw))


@pytest.mark.parametrize("layout", [
    LayoutConfig(replicate=2), LayoutConfig(shard=2), LayoutConfig(replicate=2, shard=2)], ids=str)
def test_a_head_that_judges_texts(layout):
    case = _Texts(model=_Judged(), objective=ClassifyTextConfig(), micro_batches=2)
    check(reference(case), run_processes(layout.processes, divided, case, layout))


def _evaluated_between():
    """A forward alone, between two steps, after which the weights lie as before and are those of the last step."""
    runtime = Runtime.start(CPU, LayoutConfig(shard=2))
    with torch.device("meta"):
        model = decoder().build()
    objective, batch = CausalLMConfig().build(), PACKED.batch(0)
    parallel = parallelize(model, objective, runtime)
    model.to_empty(device="cpu").initialise(0)
    before = float(parallel.losses(batch).sums["model"])
    lying = all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return before, float(parallel.losses(batch).sums["model"]), lying


def test_an_evaluation_leaves_weights_in_parts_and_reads_those_of_the_last_step():
    model, objective, batch = decoder().build(), CausalLMConfig().build(), PACKED.batch(0)
    model.initialise(0)
    before = float(objective.losses(model, batch).sums["model"])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    after = float(objective.losses(model, batch).sums["model"])
    assert before != pytest.approx(after, rel=1e-3)
    for found in run_processes(2, _evaluated_between):
        assert found == (pytest.approx(before, rel=1e-6), pytest.approx(after, rel=1e-6), True)


def _refusals():
    mesh = Runtime.start(CPU, LayoutConfig(replicate=2)).mesh
    gan = FAMILIES["gan"](image_size=8, channels=1).build()
    with pytest.raises(ConfigError, match="noise"):
        check_divisible(gan, OBJECTIVES["gan"]().build(), mesh)
    with pytest.raises(ConfigError, match="normalises over the batch"):
        check_divisible(nn.Sequential(nn.BatchNorm1d(2)), CausalLMConfig().build(), mesh)
    check_divisible(decoder().build(), CausalLMConfig().build(), mesh)
    return True


def test_losses_that_do_not_add_up_over_rows_are_refused_with_the_reason():
    assert run_processes(2, _refusals) == [True, True]
