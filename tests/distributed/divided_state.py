"""A small training state in any layout, divided by PyTorch's own tools, with every kind of thing that is saved."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dougong.optim.groups import GroupRules, parameter_groups
from dougong.runtime.device import Runtime, RuntimeConfig
from dougong.runtime.layout import LayoutConfig
from dougong.train.shadow import Shadow
from dougong.train.state import TrainState

CPU = RuntimeConfig(device="cpu", precision="fp32", threads=1)
ONE = LayoutConfig()
STAGES = {0: ("embedding", "up"), 1: ("embedding", "down", "norm")}
"""the embedding is in both: the last stage's head is tied to it"""


class Net(nn.Module):
    """Sizes that two and four do not divide, a buffer that counts, and a parameter without an axis."""

    def __init__(self, rows=11):
        super().__init__()
        self.embedding = nn.Embedding(rows, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm = nn.BatchNorm1d(6)


class Place:
    """A loader that is only a place in the data."""

    position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def divide(model, mesh):
    if mesh.size("pipeline") > 1:
        for name in {name for name, _ in model.named_children()} - set(STAGES[mesh.rank("pipeline")]):
            delattr(model, name)
    if mesh.size("tensor") > 1:
        plan = {"embedding": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh.along("tensor"), {k: v for k, v in plan.items() if hasattr(model, k)})
    if mesh.size("shard") > 1:
        axes = [axis for axis in ("replicate", "shard") if mesh.size(axis) > 1]
        fully_shard(model, mesh=mesh.devices[tuple(axes)])


def divided_state(layout, *, seed=0, done=True, rows=11):
    """(state, mesh); `done`: with the traces of a few steps. The weights follow the seed, whatever the layout."""
    mesh = Runtime.start(CPU, layout).mesh
    torch.manual_seed(seed)
    model = Net(rows)
    divide(model, mesh)
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.ndim == 2}
    groups = [*parameter_groups(matrices, GroupRules(), lr=0.1, weight_decay=0.1, momentum=0.9),
              *parameter_groups({n: p for n, p in named.items() if n not in matrices}, GroupRules(), lr=0.2,
                                weight_decay=0.0, momentum=0.0)]
    state = TrainState(model, torch.optim.AdamW(groups), lambda step: 1.0, Place(), Shadow(model, tau=0.25))
    if done:
        _leave_traces(state)
    torch.manual_seed(1000 + 10 * mesh.data_rank + mesh.rank("pipeline", "context", "tensor"))
    return state, mesh


def _leave_traces(state):
    for p in [p for group in state.optimizer.param_groups for p in group["params"]]:
        state.optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": p.detach() * 0.5 + 1,
                                    "exp_avg_sq": p.detach() ** 2}
    with torch.no_grad():
        for p in state.model.parameters():
            p.mul_(1.5)
        for buffer in state.model.buffers():
            buffer.add_(2)
    state.shadow.update(state.model, 1)
    state.step, state.tokens, state.loader.position = 7, 700, 21
    state.best = {"loss": 2.5, "step": 7, "waited": 0}
    for group in state.optimizer.param_groups:
        group["lr"] = 0.05


def whole(state):
    """Every tensor but the generators', whole, by file and name: put together by DTensor itself."""
    groups = state.state_dict()["tensors"]
    return {f"{group}/{name}": (t.full_tensor() if isinstance(t, DTensor) else t).clone()
            for group in ("model", "optimizer", "shadow") for name, t in groups[group].items()}


def together(parts):
    """What processes hold of one state, in one dict; where several hold a tensor, it is the same."""
    found = {}
    for part in parts:
        for name, tensor in part.items():
            assert name not in found or torch.equal(found[name], tensor), name
            found[name] = tensor
    return found


def assert_same(a, b):
    """Equal names and equal bits; NaN is never equal."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
