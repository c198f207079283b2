"""A tiny decoder in float64 and batches of made-up pairs for it."""

import torch

from dougong.data.batch import Batch
from dougong.models.families.qwen3 import Qwen3Config

VOCABULARY = 23


def model(seed: int = 0, *, dtype: torch.dtype = torch.float64):
    made = Qwen3Config(vocab_size=VOCABULARY, context=16, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                       ffn_dim=24, init_std=0.3).build()
    made.initialise(seed)
    made = made.to(dtype)
    made.compute_dtype = dtype
    return made


def pairs(rows: int = 5, length: int = 11, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Rows of different prompts and lengths, a reference and labels beside them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, 2, length + 1), generator=draw)
    weight = torch.zeros(rows, 2, length, dtype=dtype)
    for row in range(rows):
        for side in range(2):
            begin = 1 + row % 3
            weight[row, side, begin:length - (2 * row + side) % 5] = 1
    return Batch(tokens=ids[..., :-1].contiguous(), targets=ids[..., 1:].contiguous(), weight=weight,
                 reference=-20 - 5 * torch.rand(rows, 2, generator=draw, dtype=dtype),
                 label=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])[:rows].to(dtype))


def plain_log_probs(made, batch: Batch) -> torch.Tensor:
    """(B 2): summed log-probabilities as one writes them down, all logits at once."""
    tokens = batch["tokens"].flatten(0, 1)
    logp = made(tokens).log_softmax(-1).gather(-1, batch["targets"].flatten(0, 1)[..., None])[..., 0]
    return (logp * batch["weight"].flatten(0, 1)).sum(-1).view(-1, 2)
