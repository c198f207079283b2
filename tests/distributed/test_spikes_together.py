"""Several processes skip, name and take steps together, on the host and on the device; each says whose fault it was."""

import math

import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_processes
from safetensors.torch import load_file

from dougong.core.errors import DougongError
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
from dougong.train.suspects import name_suspects

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


def begin(layout, optimizer, objective):
    runtime = Runtime(mesh=Mesh.start(LayoutConfig(**layout), "cpu"))
    model = FAMILIES["nano"](dim=16, num_layers=2, num_heads=2, ffn_dim=32, context=8, vocab_size=32).build()
    model.initialise(3)
    model.compute_dtype = torch.float32
    parallel = parallelize(model, objective, runtime, micro_batches=1)
    state = TrainState(parallel.model, optimizer.build(parallel.model), ConstantConfig().build(STEPS),
                       Rows(runtime.mesh.data_rank, runtime.mesh.data_size))
    return runtime, parallel, state


def train(layout, optimizer, on_device):
    objective = Flaky()
    runtime, parallel, state = begin(layout, optimizer, objective)
    step_module.decides_on_device = lambda optimizer, device: on_device and bool(optimizer.state)
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


def spoilt(folder):
    objective = CausalLMConfig().build()
    runtime, parallel, state = begin({"shard": 2}, AdamWConfig(lr=1e-2), objective)
    state.loader.number = BAD
    with pytest.raises(DougongError) as caught:
        list(fit(state, objective, runtime, TrainConfig(steps=STEPS, max_skips=0), gradients=parallel.gradients,
                 directory=folder))
    return str(caught.value)


def test_each_process_writes_the_rows_it_read_of_a_batch_that_ends_training(tmp_path):
    said = run_processes(2, spoilt, tmp_path)
    names = ["offending-batch-000001.safetensors", "offending-batch-000001-rank-00001.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for rank, name in enumerate(names):
        own = Rows(rank, 2)
        own.number = BAD
        found = load_file(tmp_path / name)
        for key, tensor in next(iter(own)).items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, equal_nan=True)
        assert f"process {rank} of 2" in said[rank] and name in said[rank]


def name_rows_of_compiled_blocks(layout):
    """How many graphs there are after a step, after naming its rows, and both once more; and the losses of the rows."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)      # shape checks cannot be traced; this process was forked
    runtime = Runtime(mesh=Mesh.start(LayoutConfig(**layout), "cpu"), compile=True)
    model = FAMILIES["nano"](dim=16, num_layers=2, num_heads=2, ffn_dim=32, context=8, vocab_size=32).build()
    model.initialise(3)
    model.compute_dtype = torch.float32
    objective, graphs = CausalLMConfig().build(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    parallel = parallelize(model, objective, runtime, micro_batches=1, compile=lambda model: [
        block.compile(backend=backend) for block in model.get_submodule("stack").children()])
    state = TrainState(parallel.model, AdamWConfig(lr=1e-2).build(parallel.model), ConstantConfig().build(STEPS),
                       Rows(runtime.mesh.data_rank, runtime.mesh.data_size))
    losses, counts = [], []
    steps = fit(state, objective, runtime, TrainConfig(steps=2), gradients=parallel.gradients)
    for _ in range(2):
        result = next(steps)
        counts.append(len(graphs))
        losses += [row["loss"] for row in name_suspects(result, objective, runtime)]
        counts.append(len(graphs))
    return counts, losses


@pytest.mark.parametrize("layout", [{"replicate": 2}, {"shard": 2}], ids=["DDP", "FSDP2"])
def test_naming_rows_compiles_nothing_and_leaves_the_next_step_compiled(layout):
    for counts, losses in run_processes(2, name_rows_of_compiled_blocks, layout):
        assert counts[0] > 0 and counts == counts[:1] * 4
        assert len(losses) == 2 * 2 and all(map(math.isfinite, losses))
