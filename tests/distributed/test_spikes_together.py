"""Several processes skip, name and take steps together, on the host and on the device; each says whose fault it was."""

import math

import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_processes

from dougong.data.batch import Batch
from dougong.models import FAMILIES
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.objectives.losses import Losses
from dougong.optim.build import AdamWConfig, MuonConfig
from dougong.optim.schedules import ConstantConfig
from dougong.parallel.parallelize import parallelize
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.mesh import Mesh
from dougong.train import step as step_module
from dougong.train.config import SpikeConfig, TrainConfig
from dougong.train.loop import fit
from dougong.train.state import TrainState

STEPS, BAD, FLAKY = 14, 8, 11


class Rows:
    """Batch n depends on n alone; row 3 of batch BAD, which process 1 reads, weighs nothing that is a number."""

    def __init__(self, rank, size):
        self.rank, self.size, self.number = rank, size, 0

    def __iter__(self):
        while True:
            random = torch.Generator().manual_seed(self.number)
            tokens = torch.randint(32, (4, 9), generator=random)
            weight = torch.ones(4, 8)
            if self.number == BAD:
                weight[3, 2] = math.nan
            mine = slice(self.rank * 4 // self.size, (self.rank + 1) * 4 // self.size)
            self.number += 1
            yield Batch(tokens=tokens[mine, :-1], targets=tokens[mine, 1:], weight=weight[mine])

    def documents(self, number):
        return [[f"{number}/{row + self.rank * 4 // self.size}"] for row in range(4 // self.size)]


class Flaky(type(CausalLMConfig().build())):
    """On process 1 the loss of step FLAKY is wrong the first time it is computed."""

    def __init__(self):
        self.__dict__.update(CausalLMConfig().build().__dict__)
        self.calls = 0

    def losses(self, model, batch):
        found = super().losses(model, batch)
        if not model.training:
            return found
        self.calls += 1
        wrong = self.calls == FLAKY + 1 and dist.get_rank() == 1    # step BAD was computed twice
        return Losses({name: loss * (1e6 if wrong else 1) for name, loss in found.sums.items()}, found.metrics)


def train(layout, optimizer, on_device):
    runtime = Runtime(mesh=Mesh.start(LayoutConfig(**layout), "cpu"))
    model = FAMILIES["nano"](dim=16, num_layers=2, num_heads=2, ffn_dim=32, context=8, vocab_size=32).build()
    model.initialise(3)
    objective = Flaky()
    model.compute_dtype = torch.float32
    parallel = parallelize(model, objective, runtime, micro_batches=1)
    step_module.decides_on_device = lambda optimizer, device: on_device and bool(optimizer.state)
    state = TrainState(parallel.model, optimizer.build(parallel.model), ConstantConfig().build(STEPS),
                       Rows(runtime.mesh.data_rank, runtime.mesh.data_size))
    config = TrainConfig(steps=STEPS, spikes=SpikeConfig(window=8, sigmas=6.0, times=3.0))
    told = [(r.step, r.skipped is not None, r.verdict, (r.fault or {}).get("here"),
             r.suspects[0]["documents"] if r.suspects else [], r.loss, r.grad_norm, r.layers)
            for r in fit(state, objective, runtime, config, gradients=parallel.gradients)]
    whole = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
             for name, p in parallel.model.named_parameters()}
    return told, whole


@pytest.mark.parametrize("layout", [{"replicate": 2}, {"shard": 2}], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=1e-2), MuonConfig(lr=0.02)], ids=["adamw", "muon"])
def test_all_processes_skip_and_recover_together(layout, optimizer):
    host, device = (run_processes(2, train, layout, optimizer, on_device) for on_device in (False, True))
    for one in (host, device):
        (first, weights), (second, others) = one
        assert [told[:3] for told in first] == [told[:3] for told in second]
        assert [told[5:] for told in first if not told[1]] == [told[5:] for told in second if not told[1]]
        assert [told[:3] for told in first if told[1] or told[2]] == [(BAD + 1, True, "persistent"),
                                                                      (FLAKY, False, "transient")]
        assert second[BAD][4] == [f"{BAD}/3"], "process 1 names its own row"
        assert (first[FLAKY - 1][3], second[FLAKY - 1][3]) == (False, True), "it was process 1's machine"
        for name in weights:
            assert torch.isfinite(weights[name]).all() and torch.equal(weights[name], others[name]), name
    for name, value in host[0][1].items():
        torch.testing.assert_close(device[0][1][name], value, rtol=1e-5, atol=1e-6, msg=name)
