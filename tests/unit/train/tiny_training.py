"""A small token model, a loader with a place, and a whole training state: what the tests of `train` train."""

from types import SimpleNamespace

import torch
from torch import nn

from dougong.data.batch import Batch
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import AdamWConfig, MuonConfig
from dougong.optim.schedules import WSDConfig
from dougong.runtime import seeds
from dougong.runtime.device import Runtime
from dougong.train.config import EMAConfig, TrainConfig
from dougong.train.shadow import Shadow
from dougong.train.state import TrainState

RUNTIME = Runtime()


class TinyLM(nn.Module):
    """Embedding, two residual blocks with dropout, a tied head; obeys the LanguageModel protocol."""

    def __init__(self, vocab_size=11, dim=8, dropout=0.0, layers=2):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.compute_dtype = torch.float32
        self.embedding = nn.Embedding(vocab_size, dim)
        self.stack = nn.ModuleDict({str(i): nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(),
                                                          nn.Dropout(dropout),
                                                          nn.Linear(2 * dim, dim)) for i in range(layers)})
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def hidden(self, tokens_BT, *, segment_BT=None, cache=None):
        x = self.embedding(tokens_BT)
        for block in self.stack.values():
            x = x + block(x)
        return self.norm(x)

    def forward(self, tokens_BT, *, segment_BT=None, cache=None):
        return self.head(self.hidden(tokens_BT))

    def head_parameters(self):
        return list(self.head.parameters())


class CountingLoader:
    """Batch number n depends on n alone; a few targets weigh nothing."""

    def __init__(self, rows=6, context=5, vocab_size=11, seed=0, spoil=()):
        self.rows, self.context, self.vocab_size, self.seed = rows, context, vocab_size, seed
        self.position, self.spoil = 0, set(spoil)

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(seeds.derive(self.seed, self.position))
            tokens = torch.randint(self.vocab_size, (self.rows, self.context + 1), generator=generator)
            weight = (torch.rand(self.rows, self.context, generator=generator) > 0.2).float()
            if self.position in self.spoil:
                weight[0, 0] = torch.inf
            self.position += 1
            yield Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weight=weight)

    @property
    def epoch(self):
        return self.position // 10

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def tiny_state(*, steps=20, dropout=0.2, optimizer=None, ema=True, seed=1, **loader):
    torch.manual_seed(seed)
    model = TinyLM(dropout=dropout)
    optimizer = (optimizer or MuonConfig(weight_decay=0.01)).build(model)
    shadow = Shadow(model, every=2, tau=0.1) if ema else None
    return TrainState(model, optimizer, WSDConfig(warmup=3, decay=0.5).build(steps), CountingLoader(**loader),
                      shadow)


def tiny_config(steps=20, **changes):
    return TrainConfig(**{"steps": steps, "ema": EMAConfig(decay=0.9, every=2), **changes})


OBJECTIVE = CausalLMConfig().build()
ADAMW = AdamWConfig()


def flat(state):
    """Every tensor of a state by file and name, copied."""
    return {f"{file}/{name}": tensor.clone() for file, group in state.state_dict()["tensors"].items()
            for name, tensor in group.items()}


def assert_same(a, b):
    """Equal names and equal bits; NaN is never equal."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
