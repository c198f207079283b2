"""Small decoders with random weights, and batches for them."""

import torch

from dougong.data.batch import Batch
from dougong.models import FAMILIES

SHAPES = {"qwen3": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_dim": 48},
          "llama": {"num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "mlp_bias": True, "attention_bias": True},
          "gpt2": {"num_heads": 4}, "nano": {"num_heads": 4}}


def tiny(family="qwen3", seed=0, **changes):
    """Weights large enough for what is computed to depend on all of them."""
    shape = {"vocab_size": 61, "context": 32, "dim": 32, "num_layers": 2, **SHAPES[family], **changes}
    model = FAMILIES[family](**shape).build()
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * (1.0 if "tokens" in name else parameter.shape[1] ** -0.5))
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


def batches_of(count, rows=4, length=32, vocab_size=61, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [Batch(tokens=(ids := torch.randint(0, vocab_size, (rows, length), generator=generator)),
                  targets=ids.roll(-1, 1), weight=torch.ones(rows, length)) for _ in range(count)]
