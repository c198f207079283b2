"""The plan of a divided step against what two real processes hold, by torch's own profiler of its allocator."""

import pytest
import torch
from processes import run_processes
from unit.plan.measured_memory import most_given_out

from dougong.data.batch import Batch
from dougong.models.families.llama import LlamaConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim import OPTIMIZERS
from dougong.plan.counts import Counts
from dougong.plan.memory import memory
from dougong.plan.work import Work
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.runtime.layout import LayoutConfig
from dougong.train.state import TrainState
from dougong.train.step import take_step

MODEL = LlamaConfig(vocab_size=2048, context=256, dim=256, num_layers=6, num_heads=4, num_kv_heads=4, ffn_dim=768)
WORK = Work(model=MODEL, objective=CausalLMConfig(), optim=OPTIMIZERS["adamw"](), rows=8, context=256, steps=1,
            precision="fp32", device="cpu")


def _two_steps(runtime):
    """Of this process, the model's making included."""
    from dougong.parallel.parallelize import parallelize

    with torch.device("meta"):
        model = MODEL.build().train()
    parallel = parallelize(model, WORK.objective.build(), runtime)
    model = parallel.model.to_empty(device="cpu")
    model.initialise(0)
    state = TrainState(model, WORK.optim.build(model), lambda at: 1.0, loader=None)
    tokens = torch.randint(MODEL.vocab_size, (4, 257), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(), weight=torch.ones(4, 256))
    for _ in range(2):
        take_step(state, WORK.objective.build(), batch, runtime, micro_rows=4, weight=8 * 256.0, clip_norm=1.0,
                  gradients=parallel.gradients)


def _peak(layout):
    runtime = Runtime.start(RuntimeConfig(device="cpu", precision="fp32", threads=1), layout)
    return most_given_out(lambda: _two_steps(runtime))


@pytest.mark.parametrize(("layout", "within"), [
    (LayoutConfig(replicate=2), 0.1), (LayoutConfig(replicate=1, shard=2), 0.1),
    (LayoutConfig(replicate=1, tensor=2), 0.1),
    (LayoutConfig(replicate=1, context=2), 0.15)], ids=str)      # gloo's exchange of heads takes copies of its own
def test_a_divided_step_holds_what_the_plan_says(layout, within):
    told = sum(memory(Counts(WORK.step()), layout, "none", 4, 1, gpu=False).values())
    for measured in run_processes(2, _peak, layout):
        assert abs(told / measured - 1) < within
