"""Small models of many kinds: grouped heads, windows, value embeddings, learned positions, ALiBi."""

from dataclasses import replace

import torch

from dougong.models.compose import DecoderConfig
from dougong.models.families.gpt2 import GPT2Config
from dougong.models.families.nano import NanoConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.nn.attention import AttentionConfig
from dougong.nn.position import ALiBiConfig

CONTEXT, VOCABULARY = 48, 67
_SHAPE = {"vocab_size": VOCABULARY, "context": CONTEXT, "dim": 32, "num_layers": 3}
CONFIGS = {
    "qwen3": Qwen3Config(**_SHAPE, num_heads=4, num_kv_heads=2, head_dim=16),
    "gpt2": GPT2Config(**_SHAPE, num_heads=4),
    "nano": NanoConfig(**_SHAPE, num_heads=2, window=8, window_pattern="SL", value_embeddings="alternate"),
    "alibi": DecoderConfig(**_SHAPE, attention=AttentionConfig(num_heads=4, num_kv_heads=1),
                           position=ALiBiConfig()),
}


def build(name: str, **changes) -> torch.nn.Module:
    """A model with sharp opinions; an untrained one finds all tokens about equally likely."""
    model = replace(CONFIGS[name], **changes).build()
    model.initialise(1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return model
